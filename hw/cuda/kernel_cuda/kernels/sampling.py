"""Sampling without sorting: a program per row finds what top_k and top_p keep by narrowing a threshold, then draws.

Same tokens as the kernel's own sampler: logits / temperature, then min_p, top_k, top_p, then the largest of what is kept plus
"gumbel-fmix32/1" noise of (key, position, token). Logits are compared as integers in their order, so thresholds are exact;
weights are integers, so their sums are.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.language.core import constexpr
from triton.language.extra import libdevice

_GOLDEN, _SECOND = constexpr(0x9E3779B9), constexpr(0x7F4A7C15)
_MIX1, _MIX2 = constexpr(0x85EBCA6B), constexpr(0xC2B2AE35)
_LOWEST = constexpr(-2147483648)
_NAN = constexpr(2147483647)
BLOCK = 4096


@triton.jit
def _ordered(x):
    """float32 → int32 in the same order; NaN largest, both zeros equal."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, _NAN, key)


@triton.jit
def _value(key):
    """What `_ordered` made a key of."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _fmix(x):
    x = (x ^ (x >> 16)) * _MIX1
    x = (x ^ (x >> 13)) * _MIX2
    return x ^ (x >> 16)


@triton.jit
def _row_words(key_low, key_high, position):
    a = _fmix(key_low ^ _fmix(position + tl.full([], _GOLDEN, tl.uint32)))
    return a, _fmix(key_high ^ _fmix(a + tl.full([], _SECOND, tl.uint32)))


@triton.jit
def _noise(token, a, b, EXACT: tl.constexpr):
    """The Gumbel noise of some tokens, float32."""
    x = token.to(tl.uint32) * tl.full([], _GOLDEN, tl.uint32) + a
    x = ((x ^ (x >> 16)) * _MIX1) ^ b
    x = (x ^ (x >> 13)) * _MIX2
    x = x ^ (x >> 16)
    high = (x >> 16).to(tl.int32).to(tl.float32) * 65536.0
    u = (high + ((x & 0xFFFF).to(tl.int32).to(tl.float32) + 0.5)) * 2.3283064365386963e-10
    u = tl.minimum(u, 0.99999994039535522)
    if EXACT:
        return -libdevice.log(-libdevice.log1p(-u))
    return (-tl.log(-tl.log(1.0 - u.to(tl.float64)))).to(tl.float32)


@triton.jit
def _scaled(row, token, V, temperature):
    x = tl.load(row + token, mask=token < V, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature)


@triton.jit
def _weight(z, best, EXACT: tl.constexpr):
    """An integer in proportion to the probability; the best has 2^30."""
    if EXACT:
        return (libdevice.exp(z - best) * 1073741824.0).to(tl.int32)
    return (tl.exp(z - best) * 1073741824.0).to(tl.int32)


@triton.jit
def _largest(row, V, temperature, BLOCK: tl.constexpr):
    """The largest logit's key, and the first token that has it."""
    top = tl.full([BLOCK], _LOWEST, tl.int32)
    where = tl.full([BLOCK], _NAN, tl.int32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        token = start + tl.arange(0, BLOCK)
        key = tl.where(token < V, _ordered(_scaled(row, token, V, temperature)), _LOWEST)
        where = tl.where(key > top, token, where)
        top = tl.maximum(key, top)
    best = tl.max(top, 0)
    return best, tl.min(tl.where(top == best, where, _NAN), 0)


@triton.jit
def _count_from(row, V, temperature, p1, p2, p3, BLOCK: tl.constexpr):
    """How many logits are at least p1, p2, p3."""
    n1 = tl.zeros([BLOCK], tl.int32)
    n2 = tl.zeros([BLOCK], tl.int32)
    n3 = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        token = start + tl.arange(0, BLOCK)
        key = tl.where(token < V, _ordered(_scaled(row, token, V, temperature)), _LOWEST)
        n1 += (key >= p1).to(tl.int32)
        n2 += (key >= p2).to(tl.int32)
        n3 += (key >= p3).to(tl.int32)
    return tl.sum(n1, 0), tl.sum(n2, 0), tl.sum(n3, 0)


@triton.jit
def _mass_from(row, V, temperature, best, p1, p2, p3, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """The weights of the logits that are at least p1, p2, p3."""
    m1 = tl.zeros([BLOCK], tl.int64)
    m2 = tl.zeros([BLOCK], tl.int64)
    m3 = tl.zeros([BLOCK], tl.int64)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        token = start + tl.arange(0, BLOCK)
        z = _scaled(row, token, V, temperature)
        key = tl.where(token < V, _ordered(z), _LOWEST)
        weight = _weight(z, best, EXACT).to(tl.int64)
        m1 += tl.where(key >= p1, weight, 0)
        m2 += tl.where(key >= p2, weight, 0)
        m3 += tl.where(key >= p3, weight, 0)
    return tl.sum(m1, 0), tl.sum(m2, 0), tl.sum(m3, 0)


@triton.jit
def _pivots(low, high):
    """Three keys that cut (low, high] into quarters; low < p1 <= p2 <= p3 <= high."""
    span = high.to(tl.int64) - low.to(tl.int64)
    p1 = (low + (span + 3) // 4).to(tl.int32)
    p2 = (low + (span + 1) // 2).to(tl.int32)
    p3 = (low + (3 * span + 3) // 4).to(tl.int32)
    return p1, p2, p3


@triton.jit
def _narrow(low, high, p1, p2, p3, is1, is2, is3):
    """The largest key for which a falling condition holds lies in [low, high]; it holds at p1 if is1, ..."""
    next_low = tl.where(is3, p3, tl.where(is2, p2, tl.where(is1, p1, low)))
    next_high = tl.where(is3, high, tl.where(is2, p3 - 1, tl.where(is1, p2 - 1, p1 - 1)))
    return next_low, tl.maximum(next_low, next_high)


@triton.jit
def _kth(row, V, temperature, best, k, BLOCK: tl.constexpr):
    """The key of the k-th largest logit."""
    low, high = best * 0 + _LOWEST, best
    while low < high:
        p1, p2, p3 = _pivots(low, high)
        n1, n2, n3 = _count_from(row, V, temperature, p1, p2, p3, BLOCK)
        low, high = _narrow(low, high, p1, p2, p3, n1 >= k, n2 >= k, n3 >= k)
    return low


@triton.jit
def _pth(row, V, temperature, best, floor, is_ranked, k, share, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key from which on the kept logits have `share` of what is kept from `floor` on."""
    peak = _value(best)
    above, at, _same = _mass_from(row, V, temperature, peak, floor + 1, floor, floor, EXACT, BLOCK)
    total = at
    if is_ranked:
        n, _n2, _n3 = _count_from(row, V, temperature, floor + 1, floor + 1, floor + 1, BLOCK)
        same = _weight(_value(floor), peak, EXACT).to(tl.int64)
        total = tl.minimum(at, above + (k - n).to(tl.int64) * same)
    wanted = share.to(tl.float64) * total.to(tl.float64)
    low, high = floor, best
    while low < high:
        p1, p2, p3 = _pivots(low, high)
        m1, m2, m3 = _mass_from(row, V, temperature, peak, p1, p2, p3, EXACT, BLOCK)
        low, high = _narrow(
            low, high, p1, p2, p3,
            m1.to(tl.float64) >= wanted, m2.to(tl.float64) >= wanted, m3.to(tl.float64) >= wanted,
        )  # fmt: skip
    return low


@triton.jit
def _draw(row, V, temperature, floor, a, b, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    """The token whose logit plus noise is largest, of those from `floor` on."""
    top = tl.full([BLOCK], _LOWEST, tl.int32)
    where = tl.full([BLOCK], _NAN, tl.int32)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        token = start + tl.arange(0, BLOCK)
        z = _scaled(row, token, V, temperature)
        keep = (token < V) & (_ordered(z) >= floor)
        key = tl.where(keep, _ordered(_noise(token, a, b, EXACT) + z), _LOWEST)
        where = tl.where(key > top, token, where)
        top = tl.maximum(key, top)
    best = tl.max(top, 0)
    return tl.min(tl.where(top == best, where, _NAN), 0)


@triton.jit
def _argmax(logits, out, best_out, V, stride, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    best, token = _largest(logits + n * stride, V, 1.0, BLOCK)
    tl.store(out + n, token.to(tl.int64))
    tl.store(best_out + n, _value(best))


@triton.jit
def _sample(
    logits, slot, position, temperatures, min_ps, top_ks, top_ps, keys, out, bad, V, stride,
    FILTERS: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    row = logits + n * stride
    s = tl.load(slot + n)
    temperature = tl.load(temperatures + s)
    is_random = temperature > 0
    temperature = tl.where(is_random, temperature, 1.0)
    best, token = _largest(row, V, temperature, BLOCK)
    peak = _value(best)
    is_bad = (best == _NAN) | (peak == float("-inf"))
    if is_random & (is_bad == 0):
        floor = best * 0 + _LOWEST
        if FILTERS:
            min_p, k, share = tl.load(min_ps + s), tl.load(top_ks + s), tl.load(top_ps + s)
            if min_p > 0:
                if EXACT:
                    floor = _ordered(peak + libdevice.log(min_p))
                else:
                    floor = _ordered(peak + tl.log(min_p))
            is_ranked = (k > 0) & (k < V)
            if is_ranked:
                kth = _kth(row, V, temperature, best, k, BLOCK)
                is_ranked = kth >= floor
                floor = tl.maximum(floor, kth)
            if share < 1:
                floor = _pth(row, V, temperature, best, floor, is_ranked, k, share, EXACT, BLOCK)
        low, high = tl.load(keys + 2 * s).to(tl.uint32), tl.load(keys + 2 * s + 1).to(tl.uint32)
        a, b = _row_words(low, high, tl.load(position + n).to(tl.uint32))
        token = _draw(row, V, temperature, floor, a, b, EXACT, BLOCK)
    tl.store(out + n, token.to(tl.int64))
    tl.store(bad + n, is_bad)


@triton.jit
def _draw_rows(logits, keys, position, out, V, stride, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    low, high = tl.load(keys + 2 * n).to(tl.uint32), tl.load(keys + 2 * n + 1).to(tl.uint32)
    a, b = _row_words(low, high, tl.load(position + n).to(tl.uint32))
    tl.store(out + n, _draw(logits + n * stride, V, 1.0, _LOWEST, a, b, EXACT, BLOCK).to(tl.int64))


# ---- launches ----------------------------------------------------------------------------------------------------


def _is_exact() -> bool:
    """Compiled kernels use the logarithms that torch uses on a GPU; the interpreter has none of them."""
    return os.environ.get("TRITON_INTERPRET", "0") != "1"


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """[N, V] any float dtype → int64 [N]: the first of the largest; NaN counts as largest."""
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    best = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.shape[0]:
        _argmax[(logits.shape[0],)](logits, out, best, logits.shape[1], logits.stride(0), BLOCK=BLOCK, num_warps=16)
    return out


def draw(logits: torch.Tensor, key: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """As `draws.draw`: logits [n, V] float32 (−inf: not allowed), key int32 [n, 2], position int [n] → int64 [n]."""
    out = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    if logits.shape[0]:
        _draw_rows[(logits.shape[0],)](
            logits, key.contiguous(), position, out, logits.shape[1], logits.stride(0),
            EXACT=_is_exact(), BLOCK=BLOCK, num_warps=16,
        )  # fmt: skip
    return out


def sample(
    logits: torch.Tensor, slot: torch.Tensor, position: torch.Tensor, temperature: torch.Tensor, min_p: torch.Tensor,
    top_k: torch.Tensor, top_p: torch.Tensor, key: torch.Tensor, filters: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Every logits row as its slot asks: logits [N, V] any float dtype, after all transforms but temperature; slot int64 [N],
    position int64 [N]; of the slots temperature float32 [S] (0: greedy), min_p float32 (0: off), top_k int32 (0: off), top_p
    float32 (1: off), key int32 [S, 2]. `filters` False: no row of the batch uses min_p, top_k or top_p. → tokens int64 [N],
    and bool [N] where the row had NaN or nothing allowed. One launch, capturable, no host read."""
    count, vocab = logits.shape
    tokens = torch.empty(count, dtype=torch.int64, device=logits.device)
    bad = torch.empty(count, dtype=torch.bool, device=logits.device)
    if count:
        _sample[(count,)](
            logits, slot, position, temperature, min_p, top_k, top_p, key, tokens, bad, vocab, logits.stride(0),
            FILTERS=filters, EXACT=_is_exact(), BLOCK=BLOCK, num_warps=16,
        )  # fmt: skip
    return tokens, bad
