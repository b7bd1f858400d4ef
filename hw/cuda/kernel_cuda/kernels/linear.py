"""Products of few rows with a weight: one pass over the weight, which decides their time.

A row's sum runs over k in blocks of a fixed size whatever the number of rows, so it does not depend on the batch (up to
`FEW` rows; beyond, cuBLAS multiplies). Weights are in the rows' dtype, or int8 or e4m3 (as bytes) with a float32 scale per
output channel, or int4 with one per group of 128 inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kernel_cuda.kernels.attention import BY_BITS, NATIVE, PLAIN, decode_e4m3
from kernel_cuda.kernels.machine import capability, processors, shared_memory
from kernel_cuda.kernels.pointwise import activate

FEW = 64
SPARE = 16 << 10  # bytes of shared memory beside the tiles that are on their way
GROUP = 128  # inputs that share a scale in int4
NONE = -1


@triton.jit
def _tile(w, n, k, N, K, FP8: tl.constexpr, DOT: tl.constexpr, EVEN: tl.constexpr):
    """w [BN, BK] as numbers of the type DOT; rows past the last repeat it."""
    at = w + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K + k[None, :]
    if EVEN:
        tile = tl.load(at, eviction_policy="evict_first")
    else:
        tile = tl.load(at, mask=(k < K)[None, :], other=0, eviction_policy="evict_first")
    if FP8 == NATIVE:
        tile = tile.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    elif FP8 == BY_BITS:
        tile = decode_e4m3(tile)
    return tile.to(DOT)


@triton.jit(do_not_specialize=["M"])
def _few_rows(
    x, w, scale, bias, out, M, N, K, x_stride, out_stride,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, SCALED: tl.constexpr, FP8: tl.constexpr,
    HAS_BIAS: tl.constexpr, GATE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """out [M, N] = x [M, K] @ w.T, with GATE >= 0: w [2N, K], activation of the first half's product times the second's."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = (m < M)[:, None]
    acc = tl.zeros([BN, BM], tl.float32)
    acc2 = tl.zeros([BN, BM], tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        if EVEN:
            a = tl.load(x + m[:, None] * x_stride + k[None, :], mask=rows, other=0.0)
        else:
            a = tl.load(x + m[:, None] * x_stride + k[None, :], mask=rows & (k < K)[None, :], other=0.0)
        b = _tile(w, n, k, N, K, FP8, a.dtype, EVEN)
        if IEEE:
            acc = tl.dot(b, a.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(b, a.T, acc)
        if GATE >= 0:
            c = _tile(w + N.to(tl.int64) * K, n, k, N, K, FP8, a.dtype, EVEN)
            if IEEE:
                acc2 = tl.dot(c, a.T, acc2, input_precision="ieee")
            else:
                acc2 = tl.dot(c, a.T, acc2)
    kind = out.dtype.element_ty
    inside = n < N
    if SCALED:
        unit = 256.0 if FP8 == BY_BITS else 1.0
        acc = acc * (tl.load(scale + n, mask=inside, other=0.0) * unit)[:, None]
        if GATE >= 0:
            acc2 = acc2 * (tl.load(scale + N + n, mask=inside, other=0.0) * unit)[:, None]
    if HAS_BIAS:
        acc = acc + tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
        if GATE >= 0:
            acc2 = acc2 + tl.load(bias + N + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    if GATE >= 0:
        acted = activate(acc.to(kind).to(tl.float32), GATE).to(kind).to(tl.float32)
        acc = acted * acc2.to(kind).to(tl.float32)
    at = out + m[None, :].to(tl.int64) * out_stride + n[:, None]
    tl.store(at, acc.to(kind), mask=inside[:, None] & (m < M)[None, :])


@triton.jit
def _nibbles(x, DOT: tl.constexpr):
    """0 .. 15 as uint8 → −8 .. 7. The bits of 2^m + x are those of 2^m with x in them."""
    if tl.bfloat16 == DOT:
        return (x.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - 136.0
    elif tl.float16 == DOT:
        return (x.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - 1032.0
    else:
        return x.to(tl.float32) - 8.0


@triton.jit(do_not_specialize=["M"])
def _few_rows_int4(
    x, w, scale, bias, out, M, N, K, x_stride, out_stride,
    BM: tl.constexpr, BN: tl.constexpr, G: tl.constexpr, HAS_BIAS: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """As `_few_rows`; w uint8 [N, K / 2]: of each group of G inputs the first half in the low, the second in the high bits."""
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rows = (m < M)[:, None]
    half = tl.arange(0, G // 2)
    line = tl.minimum(n, N - 1).to(tl.int64)
    acc = tl.zeros([BN, BM], tl.float32)
    for group in range(0, K // G):
        k = group * G + half
        low = tl.load(x + m[:, None] * x_stride + k[None, :], mask=rows, other=0.0)
        high = tl.load(x + m[:, None] * x_stride + (k + G // 2)[None, :], mask=rows, other=0.0)
        packed = tl.load(w + line[:, None] * (K // 2) + (group * (G // 2) + half)[None, :], eviction_policy="evict_first")
        a, b = _nibbles(packed & 15, low.dtype), _nibbles(packed >> 4, low.dtype)
        if IEEE:
            part = tl.dot(b, high.T, tl.dot(a, low.T, input_precision="ieee"), input_precision="ieee")
        else:
            part = tl.dot(b, high.T, tl.dot(a, low.T))
        acc += part * tl.load(scale + line * (K // G) + group)[:, None]
    if HAS_BIAS:
        acc = acc + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = out + m[None, :].to(tl.int64) * out_stride + n[:, None]
    tl.store(at, acc.to(out.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _quantise_rows(x, y, scale, K, x_stride, BLOCK: tl.constexpr):
    """Rows of x as e4m3 numbers with one scale each."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    size = tl.max(tl.abs(value), 0)
    s = tl.where(size > 0, size / 448.0, 1.0)
    tl.store(scale + row, s)
    tl.store(y + row * K + k, (value / s).to(y.dtype.element_ty), mask=k < K)


# ---- launches ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shape:
    """Blocks of one product: outputs, inputs, warps and pipeline stages."""

    bn: int
    bk: int
    warps: int
    stages: int


def shape_for(outputs: int, rows: int, size: int, parts: int, units: int) -> Shape:
    """The best of those measured on an H200. `size` bytes a weight element; `parts` 2 where gate and up are multiplied
    together; `units` multiprocessors."""
    if rows > 16:
        return Shape(64 // parts, 128 // size, 4, 8)
    if outputs * parts >= 40 * units:
        return Shape(64 // parts, 256 // size, 4, 4)
    return Shape(32 if outputs >= 16 * units else 16, 256 // size, 4, 6)


def few_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None,
    gate: int = NONE, shape: Shape | None = None,
) -> torch.Tensor:  # fmt: skip
    """x [M, K] @ weight [N, K].T + bias [N] → [M, N], M up to `FEW`. weight: x's dtype, or int8, or uint8 that hold e4m3, the
    latter with scale float32 [N]. `gate` (SILU, ...): weight holds gate and up, the result is their gated product."""
    rows, inputs = x.shape
    outputs = weight.shape[0] // (1 if gate == NONE else 2)
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if not rows:
        return out
    wide = x.dtype == torch.float32
    size = weight.element_size()
    shape = shape or shape_for(outputs, rows, size, 1 if gate == NONE else 2, processors(x.device))
    bk = shape.bk // 2 if wide and size < 4 else shape.bk
    bm = min(FEW, max(16, triton.next_power_of_2(rows)))
    tile = bk * (bm * x.element_size() + shape.bn * size * (1 if gate == NONE else 2))
    stages = max(2, min(shape.stages, (shared_memory(x.device) - SPARE) // tile + 1))
    fp8 = PLAIN.value
    if weight.dtype == torch.uint8:
        fp8 = NATIVE.value if capability(x.device) >= (8, 9) else BY_BITS.value
    _few_rows[(triton.cdiv(outputs, shape.bn), triton.cdiv(rows, bm))](
        x, weight, x if scale is None else scale, x if bias is None else bias, out, rows, outputs, inputs,
        x.stride(0), out.stride(0), BM=bm, BN=shape.bn, BK=bk, EVEN=inputs % bk == 0, SCALED=scale is not None, FP8=fp8,
        HAS_BIAS=bias is not None, GATE=gate, IEEE=wide, num_warps=shape.warps, num_stages=stages,
    )  # fmt: skip
    return out


def few_rows_int4(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] times weight uint8 [N, K / 2] from `pack_int4` → [M, N]."""
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if rows:
        bm, bn = min(FEW, max(16, triton.next_power_of_2(rows))), 16 if outputs < 64 * processors(x.device) else 64
        wide = x.dtype == torch.float32
        _few_rows_int4[(triton.cdiv(outputs, bn), triton.cdiv(rows, bm))](
            x, weight, scale, x if bias is None else bias, out, rows, outputs, inputs, x.stride(0), out.stride(0),
            BM=bm, BN=bn, G=GROUP, HAS_BIAS=bias is not None, IEEE=wide, num_warps=4, num_stages=2 if wide else 4,
        )  # fmt: skip
    return out


def pack_int4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K], K a multiple of `GROUP` → (uint8 [N, K / 2], scale float32 [N, K / GROUP]); w ≈ scale * q, q in −7 .. 7."""
    outputs, inputs = weight.shape
    groups = weight.float().view(outputs, inputs // GROUP, GROUP)
    scale = groups.abs().amax(-1) / 7
    steps = groups / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    nibbles = (steps.round_() + 8).to(torch.uint8)
    low, high = nibbles.chunk(2, -1)
    return (low | (high << 4)).view(outputs, inputs // 2).contiguous(), scale


def unpack_int4(packed: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight [N, K] that `pack_int4` made."""
    groups = packed.view(packed.shape[0], -1, GROUP // 2)
    nibbles = torch.cat([groups & 15, groups >> 4], -1).float() - 8
    return (nibbles * scale[..., None]).flatten(1).to(dtype)


def quantise_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] → (e4m3 [M, K], scale float32 [M, 1]). For GPUs of capability 8.9 and later."""
    rows, inputs = x.shape
    y = torch.empty(rows, inputs, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _quantise_rows[(rows,)](x, y, scale, inputs, x.stride(0), BLOCK=triton.next_power_of_2(inputs), num_warps=8)
    return y, scale
