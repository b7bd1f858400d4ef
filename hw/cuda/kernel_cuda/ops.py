"""The ops of this device, in the shape that models call them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_core.nn.api import OpRegistry, StepView
from kernel_cuda import grouped
from kernel_cuda.kernels import history, linear, moe, pointwise
from kernel_cuda.kernels.machine import capability

OWNER = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ACTIVATIONS = {"silu": pointwise.SILU, "gelu": pointwise.GELU, "gelu_tanh": pointwise.GELU_TANH}
MANY_OUTPUTS = 100_000
GATED_ROWS, GATED_OUTPUTS = 0, 20_000  # rows up to which, and outputs from which on gate and up are multiplied together
MANY_OF_EXPERT = 64  # rows of an expert, in the mean, from which on torch multiplies
COUNTS_AT_ONCE = 1 << 22  # counters of tokens that occurred, in all
MANY = 256  # rows from which on an 8 or 4 bit weight is widened first


class PlainLinear:
    """The weight as it is, few rows of many outputs (the head) by a kernel of ours. cuBLAS is faster for the rest."""

    keeps_weight = True

    def prepare(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight, bias

    def __call__(self, x: Tensor, state: tuple[Tensor, Tensor | None]) -> Tensor:
        weight, bias = state
        if x.shape[0] > linear.FEW or weight.shape[0] < MANY_OUTPUTS or x.stride(-1) != 1:
            return F.linear(x, weight, bias)
        return linear.few_rows(x, weight, bias)

    def gated(self, x: Tensor, state: tuple[Tensor, Tensor | None], activation: str) -> Tensor | None:
        """The gated product of a weight that holds gate and up, or None where two steps are as good."""
        if x.shape[0] > GATED_ROWS or state[0].shape[0] < GATED_OUTPUTS or x.stride(-1) != 1:
            return None
        return linear.few_rows(x, *state, gate=ACTIVATIONS[activation])


class Int8Linear:
    """Weight-only int8, one scale per output channel: products of whole numbers are exact, sums are float32."""

    keeps_weight = False

    def prepare(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = weight.abs().amax(1).float() / 127
        kept = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        step = max(1, (1 << 25) // weight.shape[1])
        for at in range(0, len(weight), step):
            part = slice(at, at + step)
            steps = weight[part].float() / scale[part].clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            kept[part] = steps.round_()
        return kept, scale, bias

    def __call__(self, x: Tensor, state: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        weight, scale, bias = state
        if x.shape[0] < MANY:
            return linear.few_rows(x if x.stride(-1) == 1 else x.contiguous(), weight, bias, scale)
        y = F.linear(x, weight.to(x.dtype)).float() * scale
        return (y if bias is None else y + bias.float()).to(x.dtype)


class E4m3Linear:
    """FP8 (e4m3) weights with one scale per output channel. Few rows are multiplied as they are; many are rounded to e4m3
    themselves, with a scale each, where the GPU multiplies such numbers."""

    keeps_weight = False

    def prepare(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = (weight.abs().amax(1).float() / 448).clamp(min=torch.finfo(torch.float32).tiny)
        return (weight.float() / scale[:, None]).to(torch.float8_e4m3fn), scale, bias

    def __call__(self, x: Tensor, state: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        weight, scale, bias = state
        if x.shape[0] < MANY:
            return linear.few_rows(x if x.stride(-1) == 1 else x.contiguous(), weight.view(torch.uint8), bias, scale)
        if x.dtype == torch.bfloat16 and capability(x.device) >= (8, 9) and not any(n % 16 for n in weight.shape):
            rows, row_scale = linear.quantise_rows(x.contiguous())
            return torch._scaled_mm(rows, weight.t(), row_scale, scale[None], bias=bias, out_dtype=x.dtype)
        y = F.linear(x, weight.to(x.dtype)).float() * scale
        return (y if bias is None else y + bias.float()).to(x.dtype)


class Int4Linear:
    """Weight-only int4, a scale per output channel and 128 inputs."""

    keeps_weight = False

    def prepare(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return *linear.pack_int4(weight), bias

    def __call__(self, x: Tensor, state: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        weight, scale, bias = state
        if x.shape[0] < MANY:
            return linear.few_rows_int4(x if x.stride(-1) == 1 else x.contiguous(), weight, scale, bias)
        return F.linear(x, linear.unpack_int4(weight, scale, x.dtype), bias)


class GroupedExperts:
    """Rows grouped by expert, without a host read: few by kernels of ours, many by torch's own where it has one."""

    keeps_weight = True

    def __init__(self, activation: str) -> None:
        self.kind = ACTIVATIONS[activation]

    def prepare(self, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor, bool]:
        is_aligned = not any(n % grouped.ALIGNED for n in down.shape[1:])
        return gate_up, down, is_aligned and grouped.works(down.device, down.dtype)

    def __call__(self, x: Tensor, logits: Tensor, state: tuple[Tensor, Tensor, bool], top_k: int, renormalise: bool) -> Tensor:
        gate_up, down, by_torch = state
        weights, experts = moe.route(logits, top_k, renormalise)
        if by_torch and experts.numel() >= MANY_OF_EXPERT * len(down):
            return moe.experts_mlp_by(grouped.multiply, x, gate_up, down, weights, experts, self.kind)
        return moe.experts_mlp(x.contiguous(), gate_up, down, weights, experts, self.kind)


class Penalise:
    """The op `penalise` of the penalties: only tokens that occurred are touched, each once."""

    def __init__(self) -> None:
        self._counts = torch.zeros(0, 0)  # all zero between two uses

    def __call__(self, logits: Tensor, index: Tensor, step: StepView, numbers: Tensor) -> Tensor:
        vocab_size = logits.shape[1]
        for some in index.split(max(1, COUNTS_AT_ONCE // vocab_size)):
            if len(some) > len(self._counts):
                self._counts = torch.zeros(len(some), vocab_size, dtype=torch.int32, device=logits.device)
            history.penalise(
                logits, some, step.slot, step.row, step.history, step.known, step.num_prompt, step.ancestors, step.drafts,
                numbers, self._counts, step.max_len,
            )  # fmt: skip
        return logits


def _unit_heads(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """In place, also through views."""
    return pointwise.rotary(_unit_heads(q), _unit_heads(k), cos, sin, positions, interleaved)


def _fits(**wanted: Any) -> Callable[[Mapping[str, Any]], bool]:
    return lambda facts: facts.get("dtype") in DTYPES and all(facts.get(k) == v for k, v in wanted.items())


def _has_groups(facts: Mapping[str, Any]) -> bool:
    return _fits(format="int4")(facts) and facts["in_features"] % linear.GROUP == 0


def register(ops: OpRegistry) -> None:
    """Offer everything for bf16, fp16 and fp32."""
    for kept, op in (("int8", Int8Linear()), ("e4m3", E4m3Linear())):
        ops.register("linear", op, owner=OWNER, predicate=_fits(format=kept))
    ops.register("linear", PlainLinear(), owner=OWNER, predicate=_is_half_plain)
    ops.register("linear", Int4Linear(), owner=OWNER, predicate=_has_groups)
    for interleaved in (False, True):
        turn = partial(rotary, interleaved=interleaved)
        ops.register("rotary", turn, owner=OWNER, predicate=_fits(interleaved=interleaved))
    for name, kind in ACTIVATIONS.items():
        ops.register(name + "_mul", partial(pointwise.act_mul, kind=kind), owner=OWNER, predicate=_fits())
        ops.register("moe", GroupedExperts(name), owner=OWNER, predicate=_fits(activation=name, format="plain"))
    for name in ("rms_norm", "layer_norm", "embedding"):
        ops.register(name, getattr(pointwise, name), owner=OWNER, predicate=_fits())


def register_history(ops: OpRegistry) -> None:
    """Ops that other plugins define, on the tokens of the requests."""
    ops.register("penalise", Penalise(), owner=OWNER)
    ops.register("ban", history.ban, owner=OWNER)
    ops.register("look_up", history.look_up, owner=OWNER)


def _is_half_plain(facts: Mapping[str, Any]) -> bool:
    """float32 products stay with cuBLAS: ours would be no faster."""
    return _fits(format="plain")(facts) and facts["dtype"] != torch.float32
