"""Bytes for what crosses processes: msgpack, numpy arrays as (dtype, shape, data). No pickle."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import numpy as np

T = TypeVar("T")
_DTYPES = {"<i4", "<i8", "<f4", "<f8", "<u4", "<u8", "|u1", "|b1", "|i1", "<f2", "<u2", "<i2"}


def _to_wire(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        array = np.ascontiguousarray(value)
        return (array.dtype.str, array.shape, array.tobytes())
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(value)
    raise TypeError(f"{type(value).__name__} cannot cross processes")


def _from_wire(kind: type, value: Any) -> Any:
    if kind is np.ndarray:
        dtype, shape, data = value
        if dtype not in _DTYPES:
            raise ValueError(f"array dtype {dtype!r} is not allowed on the wire")
        return np.frombuffer(data, dtype).reshape(shape)
    raise TypeError(f"{kind} cannot cross processes")


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_wire)
_decoders: dict[type, msgspec.msgpack.Decoder[Any]] = {}


def encode(message: Any) -> bytes:
    """Any dataclass of this package, dict, list, number, string, bytes or numpy array as bytes."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview, kind: type[T]) -> T:
    """The inverse of `encode`. Arrays are read-only views of `data`. Raises msgspec.ValidationError on a wrong shape."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind, dec_hook=_from_wire)
    return decoder.decode(data)
