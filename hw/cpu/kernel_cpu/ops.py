"""The ops of this device, in the shape that models call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kernel_core.nn.api import OpRegistry
from kernel_cpu import build, history, linear, pointwise

OWNER = "cpu"
DTYPES = (torch.bfloat16, torch.float32)


class PackedProduct:
    """Multiplies by weights in the kernels' panels; the plain weight is not kept."""

    keeps_weight = False

    def __call__(self, x: Tensor, state: tuple[linear.PackedLinear, Tensor | None]) -> Tensor:
        return linear.linear(x, state[0], state[1])


class PackedLinearOp(PackedProduct):
    """bf16 or fp32 weights as they are. An embedding tied to them reads its rows from the panels."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> tuple[linear.PackedLinear, Tensor | None]:
        return linear.pack(weight), bias

    def rows(self, state: tuple[linear.PackedLinear, Tensor | None], ids: Tensor) -> Tensor:
        return linear.unpack_rows(state[0], ids)


class Int8LinearOp(PackedProduct):
    """Weight-only int8. Its rows cannot be read back, so a tied embedding keeps the plain weight."""

    def prepare(self, weight: Tensor, bias: Tensor | None) -> tuple[linear.PackedLinear, Tensor | None]:
        return linear.pack_int8(weight), bias


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """In place, pairs (i, i + rot / 2)."""
    pointwise.rotary(q, k, cos, sin, positions)
    return q, k


def rotary_interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """In place, pairs (2i, 2i + 1)."""
    pointwise.rotary(q, k, cos, sin, positions, interleaved=True)
    return q, k


def gelu_tanh_mul(x: Tensor) -> Tensor:
    return pointwise.gelu_mul(x, "tanh")


def register(ops: OpRegistry) -> None:
    """Offer everything for bf16 and fp32."""

    def fits(**wanted: Any) -> Callable[[Mapping[str, Any]], bool]:
        return lambda facts: facts.get("dtype") in DTYPES and all(facts.get(k) == v for k, v in wanted.items())

    ops.register("linear", PackedLinearOp(), owner=OWNER, predicate=fits(format="plain"))
    ops.register("linear", Int8LinearOp(), owner=OWNER, predicate=fits(format="int8"))
    ops.register("rotary", rotary, owner=OWNER, predicate=fits(interleaved=False))
    ops.register("rotary", rotary_interleaved, owner=OWNER, predicate=fits(interleaved=True))
    ops.register("gelu_tanh_mul", gelu_tanh_mul, owner=OWNER, predicate=fits())
    for name in ("rms_norm", "layer_norm", "embedding", "silu_mul", "gelu_mul"):
        ops.register(name, getattr(pointwise, name), owner=OWNER, predicate=fits())


def register_history(ops: OpRegistry) -> None:
    """Ops that other plugins define, on the tokens of the requests."""
    for name in ("penalise", "ban", "look_up"):
        ops.register(name, getattr(history, name), owner=OWNER, predicate=lambda facts: build.library() is not None)
