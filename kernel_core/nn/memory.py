"""Where a rank's memory goes: weights, activations of the largest step, and what is left for KV."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernel_core.config import EngineConfig
from kernel_core.errors import CapacityError, ConfigError
from kernel_core.nn.protocols import MemoryReport

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
LIVE_ACTIVATIONS = 6  # tensors of the widest layer's size alive at once
LIVE_LOGITS = 4  # float32 copies of the sampled rows' logits


def parse_bytes(text: str) -> int:
    """ "2GiB", "512 MB", "1000" → bytes. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if not match or match[2] not in UNITS:
        raise ConfigError(f"engine.kv_memory = {text!r} is no size; write it as 2GiB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that the modules hold, laid out by an op or not; shared storage counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [tensor for value in vars(module).values() for tensor in _tensors(value)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in a value that an op made: a tensor, or a tuple or dataclass of them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _tensors(tuple(getattr(value, field.name) for field in fields(value)))


def activation_bytes(model: nn.Module, dtype: torch.dtype, max_tokens: int, max_rows: int, vocab_size: int) -> int:
    """An estimate for one step of `max_tokens` tokens and `max_rows` sampled rows, from the widest weight (vocabulary apart)."""
    widths = [size for p in model.parameters() if p.dim() >= 2 for size in p.shape[-2:] if size != vocab_size]
    layer = max_tokens * max(widths, default=1) * dtype.itemsize * LIVE_ACTIVATIONS
    return layer + min(max_rows, max_tokens) * vocab_size * 4 * LIVE_LOGITS


@dataclass(frozen=True, slots=True)
class MemorySplit:
    """Bytes on one rank. `free` was measured after the weights were loaded; `activations` is what the largest step takes."""

    total: int
    free: int
    weights: int
    activations: int
    kv: int

    def as_mapping(self) -> Mapping[str, int]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def split_memory(config: EngineConfig, report: MemoryReport, weights: int, activations: int) -> MemorySplit:
    """Decide the KV budget: `kv_memory` when set, else the allowed share of what is free, less activations, within the
    device's own limit. Raises CapacityError stating the split when nothing is left."""
    if config.kv_memory is not None:
        kv = parse_bytes(config.kv_memory)
        if kv > report.free:
            raise CapacityError(f"engine.kv_memory asks for {_gib(kv)}, but {_gib(report.free)} are free")
    else:
        kv = int(report.free * config.memory_fraction) - activations
        kv = kv if report.kv_limit is None else min(kv, report.kv_limit)
    if kv <= 0:
        raise CapacityError(
            f"no memory is left for KV: {_gib(report.free)} free after {_gib(weights)} of weights, of which "
            f"{config.memory_fraction:.0%} may be used and {_gib(activations)} are kept for the largest step; "
            "lower engine.max_tokens_per_step or engine.max_requests, or raise engine.memory_fraction"
        )
    return MemorySplit(report.total, report.free, weights, activations, kv)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
