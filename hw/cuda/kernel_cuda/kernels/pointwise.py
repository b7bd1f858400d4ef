"""Norms, rotation, gated activations and the embedding's rows: one pass over the data each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SILU, GELU, GELU_TANH = 0, 1, 2


@triton.jit
def activate(x, KIND: tl.constexpr):
    """silu, gelu or gelu_tanh of float32."""
    if KIND == 0:
        y = x * tl.sigmoid(x)
    elif KIND == 1:
        y = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    else:
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x, residual, weight, y, total, rows, x_stride, residual_stride, eps,
    H: tl.constexpr, HP: tl.constexpr, ROWS: tl.constexpr, OFFSET: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, HP)
    mask = (row < rows)[:, None] & (column < H)[None, :]
    row = row.to(tl.int64)
    kind = x.dtype.element_ty
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
    if ADD:
        other = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(kind)
        tl.store(total + row[:, None] * H + column[None, :], value, mask=mask)
    wide = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / H + eps)
    w = tl.load(weight + column, mask=column < H, other=0.0).to(tl.float32)
    if OFFSET:
        result = wide * scale[:, None] * (w + OFFSET)[None, :]
    else:
        result = (wide * scale[:, None]).to(kind).to(tl.float32) * w[None, :]
    tl.store(y + row[:, None] * H + column[None, :], result.to(kind), mask=mask)


@triton.jit
def _layer_norm(
    x, residual, weight, bias, y, total, x_stride, residual_stride, eps,
    H: tl.constexpr, HP: tl.constexpr, ADD: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, HP)
    mask = column < H
    kind = x.dtype.element_ty
    value = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
    if ADD:
        other = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0)
        value = (value.to(tl.float32) + other.to(tl.float32)).to(kind)
        tl.store(total + row * H + column, value, mask=mask)
    wide = value.to(tl.float32)
    wide = tl.where(mask, wide - tl.sum(wide, 0) / H, 0.0)
    result = wide * tl.rsqrt(tl.sum(wide * wide, 0) / H + eps)
    if HAS_WEIGHT:
        result = result * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        result = result + tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * H + column, result.to(kind), mask=mask)


@triton.jit
def _turn(x, token, stride, head_stride, c, s, heads, i, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, heads_here):
    """Rotate the pairs i of some heads of a token in place."""
    first = 2 * i if INTERLEAVED else i
    second = first + (1 if INTERLEAVED else HALF)
    at = x + token * stride + heads_here[:, None] * head_stride
    mask = (heads_here < heads)[:, None] & (i < HALF)[None, :]
    kind = x.dtype.element_ty
    a = tl.load(at + first[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(at + second[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(at + first[None, :], (a * c[None, :] - b * s[None, :]).to(kind), mask=mask)
    tl.store(at + second[None, :], (b * c[None, :] + a * s[None, :]).to(kind), mask=mask)


@triton.jit
def _rotary(
    q, k, cos, sin, positions, q_heads, k_heads, q_stride, q_head, k_stride, k_head,
    HALF: tl.constexpr, HALFP: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    i = tl.arange(0, HALFP)
    position = tl.load(positions + token)
    c = tl.load(cos + position * HALF + i, mask=i < HALF, other=0.0)
    s = tl.load(sin + position * HALF + i, mask=i < HALF, other=0.0)
    head = part * HEADS + tl.arange(0, HEADS)
    if part * HEADS < q_heads:
        _turn(q, token, q_stride, q_head, c, s, q_heads, i, HALF, INTERLEAVED, head)
    if part * HEADS < k_heads:
        _turn(k, token, k_stride, k_head, c, s, k_heads, i, HALF, INTERLEAVED, head)


@triton.jit
def _act_mul(x, y, stride, F, KIND: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    kind = x.dtype.element_ty
    gate = tl.load(x + row * stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * stride + F + column, mask=mask, other=0.0).to(tl.float32)
    acted = activate(gate, KIND).to(kind).to(tl.float32)
    tl.store(y + row * F + column, (acted * up).to(kind), mask=mask)


@triton.jit
def _gather(ids, weight, y, H, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids + row).to(tl.int64)
    tl.store(y + row * H + column, tl.load(weight + token * H + column, mask=column < H), mask=column < H)


@triton.jit
def _mask_bits(logits, index, words, stride, words_stride, V, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + n.to(tl.int64) * words_stride + token // 32, mask=token < V, other=0)
    row = tl.load(index + n).to(tl.int64)
    banned = ((word >> (token % 32)) & 1) == 0
    tl.store(logits + row * stride + token, float("-inf"), mask=banned & (token < V))


# ---- launches ----------------------------------------------------------------------------------------------------


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _warps(size: int) -> int:
    return 1 if size <= 512 else 4 if size <= 4096 else 8


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] → (normalised, x + residual), rounded where the op's reference rounds."""
    x = _rows(x)
    count, size = x.shape
    y = torch.empty(count, size, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    other = x if residual is None else _rows(residual)
    padded = triton.next_power_of_2(size)
    rows = max(1, min(16, 512 // padded))
    if count:
        _rms_norm[(triton.cdiv(count, rows),)](
            x, other, weight, y, total, count, x.stride(0), other.stride(0), eps,
            H=size, HP=padded, ROWS=rows, OFFSET=offset, ADD=residual is not None, num_warps=_warps(padded),
        )  # fmt: skip
    return y, total


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, H] → (normalised, x + residual)."""
    x = _rows(x)
    count, size = x.shape
    y = torch.empty(count, size, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    other = x if residual is None else _rows(residual)
    padded = triton.next_power_of_2(size)
    if count:
        _layer_norm[(count,)](
            x, other, x if weight is None else weight, x if bias is None else bias, y, total, x.stride(0), other.stride(0), eps,
            H=size, HP=padded, ADD=residual is not None, HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            num_warps=_warps(padded),
        )  # fmt: skip
    return y, total


def rotary(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates q [T, Hq, D] and k [T, Hk, D] in place; elements of a head contiguous."""
    count, half = q.shape[0], cos.shape[1]
    heads = 8
    if count:
        _rotary[(count, triton.cdiv(max(q.shape[1], k.shape[1]), heads))](
            q, k, cos, sin, positions, q.shape[1], k.shape[1], q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            HALF=half, HALFP=triton.next_power_of_2(half), INTERLEAVED=interleaved, HEADS=heads, num_warps=2,
        )  # fmt: skip
    return q, k


def act_mul(x: torch.Tensor, kind: int) -> torch.Tensor:
    """x [T, 2F] → activation of the first half times the second [T, F]."""
    x = _rows(x)
    count, size = x.shape[0], x.shape[1] // 2
    y = torch.empty(count, size, dtype=x.dtype, device=x.device)
    if count:
        _act_mul[(count, triton.cdiv(size, 1024))](x, y, x.stride(0), size, KIND=kind, BLOCK=1024, num_warps=4)
    return y


def embedding(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Rows ids [T] of weight [V, H]."""
    size = weight.shape[1]
    y = torch.empty(ids.shape[0], size, dtype=weight.dtype, device=weight.device)
    if ids.shape[0]:
        _gather[(ids.shape[0], triton.cdiv(size, 2048))](ids, weight, y, size, BLOCK=2048, num_warps=4)
    return y


def mask_bits(logits: torch.Tensor, index: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """−inf into rows index [n] of logits [N, V] where words int32 [n, ceil(V / 32)] have a zero bit; in place."""
    vocab = logits.shape[1]
    if index.shape[0]:
        grid = (index.shape[0], triton.cdiv(vocab, 4096))
        _mask_bits[grid](logits, index, words, logits.stride(0), words.stride(0), vocab, BLOCK=4096, num_warps=8)
    return logits
