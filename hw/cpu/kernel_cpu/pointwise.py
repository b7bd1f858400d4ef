"""Norms, rotary embedding, gated activations, embedding gather and argmax, each one pass over its data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cpu import build
from kernel_cpu.linear import PackedLinear, unpack_rows

_ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2}


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """x [T, H] (+ residual [T, H]) normalised by its root mean square; returns (normalised, x + residual), both in x's dtype.

    ``weight`` [H] in x's dtype, or None. ``offset`` 0: the normalised row is rounded to x's dtype, then multiplied by the
    weight (Llama); 1: multiplied by 1 + weight in fp32 and rounded once (Gemma). Without a residual, x itself is returned.
    """
    return _norm(0, x, weight, None, eps, residual, offset)


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x [T, H] (+ residual) with mean 0 and variance 1, times weight plus bias; rounded once. Returns as ``rms_norm`` does."""
    return _norm(1, x, weight, bias, eps, residual, 0)


def _norm(
    kind: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, offset: int
) -> tuple[Tensor, Tensor]:
    rows, width = x.shape
    is_bf16 = _is_bf16(x)
    for other in (weight, bias, residual):
        if other is not None and (other.dtype != x.dtype or other.shape[-1] != width):
            raise ValueError(f"x {tuple(x.shape)} {x.dtype} with a weight, bias or residual {tuple(other.shape)} {other.dtype}")
    kernels = build.library()
    if kernels is None:
        return _plain_norm(kind, x, weight, bias, eps, residual, offset)
    x = _rows(x)
    out = torch.empty(rows, width, dtype=x.dtype)
    total = x
    if residual is not None:
        residual = _rows(residual)
        total = torch.empty(rows, width, dtype=x.dtype)
    kernels.kc_norm(
        kind, is_bf16, x.data_ptr(), x.stride(0), _pointer(weight), _pointer(bias), _pointer(residual),
        0 if residual is None else residual.stride(0), out.data_ptr(), total.data_ptr(), rows, width, eps, offset,
    )  # fmt: skip
    return out, total


def rotary(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> None:
    """Rotates q [T, Hq, D] and k [T, Hk, D] in place at positions int64 [T]; cos and sin are fp32 [P, rot / 2].

    The first ``rot`` elements of each head turn, the rest stay. Pairs are (i, i + rot/2), or (2i, 2i+1) when interleaved.
    Computed in fp32, rounded once. q and k may be views with any token and head strides, elements contiguous (ValueError
    otherwise). Raises IndexError for a position past the table.
    """
    is_bf16 = _is_bf16(q)
    if q.stride(2) != 1 or (k is not None and (k.stride(2) != 1 or k.dtype != q.dtype)):
        raise ValueError("q and k must have contiguous elements and one dtype: they are rotated in place")
    half = cos.shape[1]
    if cos.dtype != torch.float32 or sin.dtype != torch.float32 or cos.shape != sin.shape or 2 * half > q.shape[2]:
        raise ValueError(f"cos {tuple(cos.shape)} {cos.dtype}, sin {tuple(sin.shape)} {sin.dtype} for heads of {q.shape[2]}")
    kernels = build.library()
    if kernels is None:
        for x in (q, k):
            if x is not None:
                _plain_rotary(x, cos[positions][:, None], sin[positions][:, None], interleaved)
        return
    positions, cos, sin = positions.to(torch.int64).contiguous(), cos.contiguous(), sin.contiguous()
    other = q if k is None else k
    if kernels.kc_rotary(
        is_bf16, q.data_ptr(), q.stride(0), q.stride(1), q.shape[1],
        _pointer(k), other.stride(0), other.stride(1), other.shape[1],
        cos.data_ptr(), sin.data_ptr(), cos.shape[0], positions.data_ptr(), q.shape[0], half, interleaved,
    ):  # fmt: skip
        raise IndexError(f"position outside the table of {cos.shape[0]}")


def silu_mul(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x [T, 2F] -> silu(x[:, :F]) * x[:, F:], [T, F]; the activation is rounded to x's dtype before the product.

    ``out`` [T, F], contiguous, receives the result and is returned.
    """
    return _gate("silu", x, out)


def gelu_mul(x: Tensor, approximate: str = "none", out: Tensor | None = None) -> Tensor:
    """x [T, 2F] -> gelu(x[:, :F]) * x[:, F:]; ``approximate`` "tanh" or "none" (erf), as in torch. Rounds as ``silu_mul``."""
    return _gate("gelu_tanh" if approximate == "tanh" else "gelu", x, out)


def _gate(activation: str, x: Tensor, out: Tensor | None) -> Tensor:
    is_bf16 = _is_bf16(x)
    rows, width = x.shape[0], x.shape[1] // 2
    if out is None:
        out = torch.empty(rows, width, dtype=x.dtype)
    elif out.shape != (rows, width) or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} for a result {[rows, width]} {x.dtype}")
    kernels = build.library()
    if kernels is None:
        gate, up = x.chunk(2, -1)
        if activation == "silu":
            return out.copy_(F.silu(gate) * up)
        return out.copy_(F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up)
    x = _rows(x)
    kernels.kc_gate(_ACTIVATIONS[activation], is_bf16, x.data_ptr(), x.stride(0), out.data_ptr(), rows, width)
    return out


def embedding(ids: Tensor, weight: Tensor | PackedLinear) -> Tensor:
    """Rows ids (int64 [T]) of weight [V, H], of any dtype; or of a packed weight, for a head tied to the embedding.

    Raises IndexError for an id outside the table.
    """
    if isinstance(weight, PackedLinear):
        return unpack_rows(weight, ids)
    kernels = build.library()
    if kernels is None:
        return weight[ids]
    weight, ids = _rows(weight), ids.to(torch.int64).contiguous()
    out = torch.empty(ids.shape[0], weight.shape[1], dtype=weight.dtype)
    size = weight.element_size()
    source = (weight.data_ptr(), weight.stride(0) * size, ids.data_ptr(), ids.shape[0], weight.shape[0])
    if kernels.kc_gather(*source, out.data_ptr(), weight.shape[1] * size):
        raise IndexError(f"id outside the table of {weight.shape[0]} rows")
    return out


def argmax(x: Tensor) -> Tensor:
    """The index of the first largest element of each row of x [N, V], int64 [N]; a NaN counts as largest, as in torch."""
    is_bf16 = _is_bf16(x)
    kernels = build.library()
    if kernels is None:
        return x.argmax(-1)
    x = _rows(x)
    out = torch.empty(x.shape[0], dtype=torch.int64)
    kernels.kc_argmax(is_bf16, x.data_ptr(), x.stride(0), out.data_ptr(), x.shape[0], x.shape[1])
    return out


def _is_bf16(x: Tensor) -> bool:
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"{x.dtype}: expected bf16 or fp32")
    return x.dtype == torch.bfloat16


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _plain_norm(
    kind: int, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None, offset: int
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    if kind == 1:
        parts = [None if p is None else p.float() for p in (weight, bias)]
        return F.layer_norm(total.float(), total.shape[-1:], *parts, eps=eps).to(x.dtype), total
    y = total.float() * torch.rsqrt(total.float().square().mean(-1, keepdim=True) + eps)
    if weight is None:
        return y.to(x.dtype), total
    return ((y * (weight.float() + offset)).to(x.dtype) if offset else y.to(x.dtype) * weight), total


def _plain_rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    half = cos.shape[-1]
    a, b = (x[..., : 2 * half : 2], x[..., 1 : 2 * half : 2]) if interleaved else (x[..., :half], x[..., half : 2 * half])
    left, right = a.float() * cos - b.float() * sin, b.float() * cos + a.float() * sin
    a.copy_(left)
    b.copy_(right)
