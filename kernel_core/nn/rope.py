"""Rotary position embedding: the kinds that checkpoints ask for, and the tables of a length.

`RopeConfig` is read from config.json in both spellings (`rope_parameters`, or `rope_scaling` beside `rope_theta`). The tables
are float32 and made once, for the longest length that the engine is configured for. Two kinds depend on the length of the
sequence: "dynamic" and "longrope". An engine must give a request the same tokens whatever else runs, so both follow the
length of the engine: "dynamic" stretches its base for it, "longrope" takes the long factors when it exceeds the original one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernel_core.errors import ConfigError
from kernel_core.nn.protocols import ModelContext

DEFAULT_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """One rotary embedding. `dim`: how many elements of a head turn. `max_positions`: what the checkpoint was made for,
    `original_positions`: before its context was extended. `attention_factor` None: the kind's own rule."""

    dim: int
    theta: float = DEFAULT_THETA
    kind: str = "default"
    max_positions: int = 2048
    original_positions: int = 2048
    factor: float | None = None
    attention_factor: float | None = None
    interleaved: bool = False
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1
    high_freq_factor: float = 4
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


_NUMBERS = ("factor", "attention_factor", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor")


def read_rope(config: Mapping[str, Any], head_dim: int, layer_type: str | None = None, **defaults: Any) -> RopeConfig:
    """The rotary embedding of a layer type ("full_attention", ...; None: of all layers). `defaults` are fields that
    config.json may leave out (`theta`). Raises ConfigError for a kind or a value that is not supported."""
    stated = _stated(config, layer_type)
    kind = stated.get("rope_type") or stated.get("type") or "default"
    if kind not in KINDS:
        raise ConfigError(f"config.json asks for rope_type {kind!r}; supported are {sorted(KINDS)}")
    longest = int(config["max_position_embeddings"])
    original = config.get("original_max_position_embeddings") or stated.get("original_max_position_embeddings") or longest
    theta = stated.get("rope_theta") or config.get("rope_theta") or defaults.pop("theta", DEFAULT_THETA)
    part = stated.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    numbers = {name: stated[name] for name in _NUMBERS if stated.get(name) is not None}
    betas = {name: stated[name] for name in ("beta_fast", "beta_slow") if stated.get(name)}
    factors = {name: tuple(stated[name]) for name in ("short_factor", "long_factor") if stated.get(name)}
    read = {"theta": float(theta), "kind": kind, "max_positions": longest, "original_positions": int(original)}
    rope = RopeConfig(dim=int(head_dim * part), **{**defaults, **read, **numbers, **betas, **factors})
    _check(rope)
    return rope


def _stated(config: Mapping[str, Any], layer_type: str | None) -> Mapping[str, Any]:
    """`rope_parameters`, of the layer type when they are given by layer type, else the old `rope_scaling`."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = {name: value for name, value in parameters.items() if isinstance(value, Mapping)}
    if not nested:
        return parameters
    if layer_type not in nested:
        raise ConfigError(f"config.json gives rope_parameters for {sorted(nested)}, not for {layer_type!r}")
    return nested[layer_type]


def _check(rope: RopeConfig) -> None:
    if rope.kind in ("linear", "dynamic", LLAMA3) and rope.factor is None:
        raise ConfigError(f"config.json gives no `factor` for rope_type {rope.kind!r}")
    for name in ("short_factor", "long_factor"):
        if rope.kind == "longrope" and len(getattr(rope, name)) != rope.dim // 2:
            raise ConfigError(f"`{name}` of rope_type 'longrope' needs {rope.dim // 2} numbers, has {len(getattr(rope, name))}")


# ---- inverse frequencies: (rope, length) → [dim / 2], and the factor on cos and sin ------------------------------


def _powers(rope: RopeConfig, theta: float | Tensor | None = None) -> Tensor:
    return (rope.theta if theta is None else theta) ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim)


def _default(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    return 1.0 / _powers(rope), 1.0


def _linear(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    return 1.0 / _powers(rope) / rope.factor, 1.0


def _dynamic(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    stretch = rope.factor * max(length, rope.max_positions) / rope.max_positions - (rope.factor - 1)
    return 1.0 / _powers(rope, rope.theta * stretch ** (rope.dim / (rope.dim - 2))), 1.0


def _yarn(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    factor = rope.factor or rope.max_positions / rope.original_positions
    low, high = (_rotations_dim(rope, beta) for beta in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low if high != low else 0.001)
    interpolated = ramp.clamp(0, 1)
    powers = _powers(rope)
    return interpolated / (factor * powers) + (1 - interpolated) / powers, _yarn_factor(rope, factor)


def _rotations_dim(rope: RopeConfig, rotations: float) -> float:
    """The (fractional) index of the pair that turns so many times within the original length."""
    return rope.dim * math.log(rope.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))


def _yarn_factor(rope: RopeConfig, factor: float) -> float:
    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1)


def _longrope(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    factors = rope.long_factor if length > rope.original_positions else rope.short_factor
    scale, factor = rope.attention_factor, rope.factor or rope.max_positions / rope.original_positions
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(rope.original_positions))
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * _powers(rope)), scale


def _llama3(rope: RopeConfig, length: int) -> tuple[Tensor, float]:
    """Long wavelengths are divided by the factor, short ones stay, those between are blended."""
    plain = 1.0 / _powers(rope)
    turns = rope.original_positions / (2 * math.pi / plain)
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * plain / rope.factor + blend * plain, 1.0


LLAMA3 = "llama3"
KINDS: Mapping[str, Callable[[RopeConfig, int], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    LLAMA3: _llama3,
}


def rope_tables(rope: RopeConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin float32 [length, dim / 2], the kind's factor multiplied in."""
    frequencies, scale = KINDS[rope.kind](rope, length)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * frequencies
    return angles.cos() * scale, angles.sin() * scale


class Rotary(nn.Module):
    """Rotates q and k in the layers that share one `RopeConfig`. Its tables are made by `finish`."""

    def __init__(self, ctx: ModelContext, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        asked = ctx.config.engine.max_model_len
        self.rope, self.device = rope, ctx.device
        self.length = rope.max_positions if asked == "auto" else int(asked)
        self.rotate = ctx.ops.resolve("rotary", dtype=ctx.dtype, head_dim=head_dim, interleaved=rope.interleaved)
        self.cos = self.sin = None

    def finish(self) -> None:
        cos, sin = rope_tables(self.rope, self.length)
        self.cos, self.sin = cos.to(self.device), sin.to(self.device)

    def forward(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q [T, Hq, D], k [T, Hk, D] at positions [T] → the same, rotated; may reuse their storage."""
        return self.rotate(q, k, self.cos, self.sin, positions)
