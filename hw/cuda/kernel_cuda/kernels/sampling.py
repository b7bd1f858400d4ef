"""Sampling without sorting. A row is cut into parts. A histogram of the logits below the row's peak bounds which of them decide
what top_k and top_p keep; those are listed, and the exact threshold is found among them by narrowing. Then every part draws.

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
PART = 4096  # tokens that one program looks at
BINS = 512  # of the histogram of logits below a row's peak
ROOM = 16384  # tokens among which a row's thresholds are searched; more are searched slowly


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
def _peak_part(logits, slot, temperatures, peaks, table, found, V, stride, parts, BINS: tl.constexpr, PART: tl.constexpr):
    """The largest key of a part of a row; and the row's histogram and list are emptied."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures + tl.load(slot + n))
    token = part * PART + tl.arange(0, PART)
    z = _scaled(logits + n * stride, token, V, tl.where(temperature > 0, temperature, 1.0))
    tl.store(peaks + n * parts + part, tl.max(tl.where(token < V, _ordered(z), _LOWEST), 0))
    bins = tl.arange(0, BINS)
    tl.store(table + n * BINS + bins, 0, mask=bins % parts == part)
    tl.store(found + n, 0, mask=part == 0)


@triton.jit
def _settings(n, slot, temperatures, min_ps, top_ks, top_ps, peaks, parts, V, PP: tl.constexpr, EXACT: tl.constexpr):
    """Of a row: temperature, the peak's key, the key that min_p keeps from, top_k (0: off), top_p, and whether they matter."""
    s = tl.load(slot + n)
    part = tl.arange(0, PP)
    best = tl.max(tl.load(peaks + n * parts + part, mask=part < parts, other=_LOWEST), 0)
    peak = _value(best)
    temperature, min_p = tl.load(temperatures + s), tl.load(min_ps + s)
    k, share = tl.load(top_ks + s), tl.load(top_ps + s)
    k = tl.where(k < V, tl.maximum(k, 0), 0)
    if EXACT:
        floor = _ordered(peak + libdevice.log(min_p))
    else:
        floor = _ordered((peak + tl.log(tl.maximum(min_p, 1e-38))).to(tl.float32))
    floor = tl.where(min_p > 0, floor, _LOWEST)
    usable = (best != _NAN) & (peak > float("-inf")) & (temperature > 0)
    return tl.where(temperature > 0, temperature, 1.0), best, floor, k, share, usable & ((k > 0) | (share < 1) | (min_p > 0))


@triton.jit
def _bin(z, peak, BINS: tl.constexpr):
    """How far below the peak, in steps of 1 / 16; the last bin takes the rest. Falls with z."""
    return tl.minimum((peak - z) * 16.0, BINS - 1.0).to(tl.int32)


@triton.jit
def _coarse(
    logits, slot, temperatures, min_ps, top_ks, top_ps, peaks, table, mass, V, stride, parts,
    BINS: tl.constexpr, PART: tl.constexpr, PP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Counts by bin of what min_p keeps, and the weight of a part."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, best, floor, k, share, matters = _settings(
        n, slot, temperatures, min_ps, top_ks, top_ps, peaks, parts, V, PP, EXACT
    )
    if matters & ((k > 0) | (share < 1)):
        token = part * PART + tl.arange(0, PART)
        z = _scaled(logits + n * stride, token, V, temperature)
        keep = (token < V) & (_ordered(z) >= floor)
        peak = _value(best)
        weight = tl.where(keep, _weight(z, peak, EXACT), 0).to(tl.int64)
        tl.store(mass + n * parts + part, tl.sum(weight, 0))
        place = tl.where(keep, _bin(tl.where(keep, z, peak), peak, BINS), BINS)
        count = tl.histogram(place, 2 * BINS)  # what is not kept goes beyond the bins
        bins = tl.arange(0, 2 * BINS)
        tl.atomic_add(table + n * BINS + bins, count, mask=(bins < BINS) & (count > 0), sem="relaxed")


@triton.jit
def _bins(table, n, k, share, BINS: tl.constexpr):
    """The bins [first, last] of the tokens that decide what top_k and top_p keep, how many tokens these are and how many are
    above them, and whether top_k counts (fewer tokens than k may be left). The bins' edges bound the weights in them."""
    bins = tl.arange(0, BINS)
    count = tl.load(table + n * BINS + bins)
    below = tl.cumsum(count, 0)
    is_ranked = (k > 0) & (tl.max(below, 0) >= k)
    wide = count.to(tl.float32)
    least, most = wide * tl.exp((bins + 1) * -0.0625), wide * tl.exp(bins * -0.0625)
    most_to, least_to = tl.cumsum(most, 0), tl.cumsum(least, 0)
    rest = tl.sum(most, 0)
    surely = least_to * (1 - share) * 0.98 > (rest - most_to + 3e-4 * rest) * share * 1.02
    perhaps = most_to * (1 - share) * 1.02 + 3e-4 * rest >= (tl.sum(least, 0) - least_to - 3e-4 * rest) * share * 0.98
    last = tl.min(tl.where(tl.where(is_ranked, below >= k, surely), bins, BINS - 1), 0)
    first = tl.min(tl.where(perhaps, bins, BINS - 1), 0)
    first = tl.where(is_ranked, tl.where(share < 1, 0, last), tl.minimum(first, last))
    above = tl.sum(tl.where(bins < first, count, 0), 0)
    return first, last, tl.sum(tl.where(bins <= last, count, 0), 0) - above, above, is_ranked


@triton.jit
def _compact(
    logits, slot, temperatures, min_ps, top_ks, top_ps, peaks, table, found, listed, heavier, V, stride, parts,
    BINS: tl.constexpr, PART: tl.constexpr, PP: tl.constexpr, ROOM: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """List the keys of the tokens that decide, in any order, but none where there are too many; and the weight of those above."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, best, floor, k, share, matters = _settings(
        n, slot, temperatures, min_ps, top_ks, top_ps, peaks, parts, V, PP, EXACT
    )
    if matters & ((k > 0) | (share < 1)):
        first, last, count, _above, _ranked = _bins(table, n, k, share, BINS)
        if count <= ROOM:
            token = part * PART + tl.arange(0, PART)
            z = _scaled(logits + n * stride, token, V, temperature)
            key = _ordered(z)
            peak = _value(best)
            keep = (token < V) & (key >= floor)
            place = _bin(tl.where(keep, z, peak), peak, BINS)
            heavy = tl.where(keep & (place < first), _weight(z, peak, EXACT), 0).to(tl.int64)
            tl.store(heavier + n * parts + part, tl.sum(heavy, 0))
            keep = keep & (place >= first) & (place <= last)
            chosen = keep.to(tl.int32)
            total = tl.sum(chosen, 0)
            if total > 0:
                begin = tl.atomic_add(found + n, total, sem="relaxed")
                tl.store(listed + n * ROOM + begin + tl.cumsum(chosen, 0) - 1, key, mask=keep)


@triton.jit
def _list_kth(keys, k, low, high):
    """The largest key that k of the keys reach."""
    while low < high:
        p1, p2, p3 = _pivots(low, high)
        n1, n2 = tl.sum((keys >= p1).to(tl.int32), 0), tl.sum((keys >= p2).to(tl.int32), 0)
        n3 = tl.sum((keys >= p3).to(tl.int32), 0)
        low, high = _narrow(low, high, p1, p2, p3, n1 >= k, n2 >= k, n3 >= k)
    return low


@triton.jit
def _list_pth(keys, weights, above, wanted, low, high):
    """The largest key from which on the weights, and those `above` the list, reach `wanted`."""
    while low < high:
        p1, p2, p3 = _pivots(low, high)
        m1, m2 = tl.sum(tl.where(keys >= p1, weights, 0), 0), tl.sum(tl.where(keys >= p2, weights, 0), 0)
        m3 = tl.sum(tl.where(keys >= p3, weights, 0), 0)
        low, high = _narrow(
            low, high, p1, p2, p3,
            (above + m1).to(tl.float64) >= wanted, (above + m2).to(tl.float64) >= wanted,
            (above + m3).to(tl.float64) >= wanted,
        )  # fmt: skip
    return low


@triton.jit
def _floors(
    logits, slot, temperatures, min_ps, top_ks, top_ps, peaks, table, mass, found, listed, heavier, floors, V, stride, parts,
    BINS: tl.constexpr, PP: tl.constexpr, ROOM: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The key from which on each row keeps its tokens. A row without a list is searched as a whole, slowly."""
    n = tl.program_id(0).to(tl.int64)
    temperature, best, floor, k, share, matters = _settings(
        n, slot, temperatures, min_ps, top_ks, top_ps, peaks, parts, V, PP, EXACT
    )
    if matters & ((k > 0) | (share < 1)):
        _first, _last, _count, above, is_ranked = _bins(table, n, k, share, BINS)
        count = tl.load(found + n)  # what was listed: sums of floats, which bound the bins, may differ from one kernel to another
        peak = _value(best)
        if count > 0:
            place = tl.arange(0, ROOM)
            keys = tl.load(listed + n * ROOM + place, mask=place < count, other=_LOWEST)
            held = place < count
            weights = tl.where(held, _weight(tl.where(held, _value(keys), peak), peak, EXACT), 0).to(tl.int64)
            part = tl.arange(0, PP)
            total = tl.sum(tl.load(mass + n * parts + part, mask=part < parts, other=0), 0)
            heavy = tl.sum(tl.load(heavier + n * parts + part, mask=part < parts, other=0), 0)
            low, high = tl.min(tl.where(held, keys, best), 0), tl.max(keys, 0)
            if is_ranked:
                floor = _list_kth(keys, k - above, low, high)
                over = tl.sum((keys > floor).to(tl.int32), 0)
                same = _weight(_value(floor), peak, EXACT).to(tl.int64)
                total = tl.sum(tl.where(keys > floor, weights, 0), 0) + (k - over).to(tl.int64) * same
            if share < 1:
                wanted = share.to(tl.float64) * total.to(tl.float64)
                floor = _list_pth(keys, weights, heavy, wanted, tl.maximum(floor, low), high)
        else:
            row = logits + n * stride
            if is_ranked:
                floor = tl.maximum(floor, _kth(row, V, temperature, best, k, BLOCK))
            if share < 1:
                floor = _pth(row, V, temperature, best, floor, is_ranked, k, share, EXACT, BLOCK)
    tl.store(floors + n, floor)


@triton.jit
def _draw_part(
    logits, slot, position, temperatures, keys, floors, best_out, token_out, V, stride, parts,
    RANDOM: tl.constexpr, FILTERS: tl.constexpr, EXACT: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """The token of a part whose logit, plus noise where the row is random, is largest of those that are kept."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    s = tl.load(slot + n) if RANDOM else n
    temperature = tl.load(temperatures + s) if RANDOM else 0.0
    token = part * PART + tl.arange(0, PART)
    z = _scaled(logits + n * stride, token, V, tl.where(temperature > 0, temperature, 1.0))
    keep = token < V
    if FILTERS:
        keep = keep & (_ordered(z) >= tl.load(floors + n))
    if (temperature > 0) & (tl.max(keep.to(tl.int32), 0) > 0):
        low, high = tl.load(keys + 2 * s).to(tl.uint32), tl.load(keys + 2 * s + 1).to(tl.uint32)
        a, b = _row_words(low, high, tl.load(position + n).to(tl.uint32))
        z = z + _noise(token, a, b, EXACT)
    key = tl.where(keep, _ordered(z), _LOWEST)
    best = tl.max(key, 0)
    tl.store(best_out + n * parts + part, best)
    tl.store(token_out + n * parts + part, tl.min(tl.where(key == best, token, _NAN), 0))


@triton.jit
def _pick(best, token, out, bad, parts, PP: tl.constexpr):
    """The first of a row's best tokens, and whether it was usable."""
    n = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PP)
    keys = tl.load(best + n * parts + part, mask=part < parts, other=_LOWEST)
    tokens = tl.load(token + n * parts + part, mask=part < parts, other=_NAN)
    largest = tl.max(keys, 0)
    tl.store(out + n, tl.min(tl.where(keys == largest, tokens, _NAN), 0).to(tl.int64))
    tl.store(bad + n, (largest == _NAN) | (_value(largest) == float("-inf")))


@triton.jit
def _keep_part(logits, slot, temperatures, floors, out, V, stride, FILTERS: tl.constexpr, PART: tl.constexpr):
    """The scaled logits of a part of a row, and -inf for those that are not kept."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * PART + tl.arange(0, PART)
    z = _scaled(logits + n * stride, token, V, tl.load(temperatures + tl.load(slot + n)))
    if FILTERS:
        z = tl.where(_ordered(z) >= tl.load(floors + n), z, float("-inf"))
    tl.store(out + n * V + token, z, mask=token < V)


@triton.jit
def _rank_part(logits, chosen, peaks, masses, above, V, stride, parts, PART: tl.constexpr):
    """Of a part of a row: its largest logit, the sum of exp(logit - largest), and how many are larger than the chosen one."""
    n, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = logits + n * stride
    own = tl.load(row + tl.load(chosen + n)).to(tl.float32)
    token = part * PART + tl.arange(0, PART)
    x = tl.load(row + token, mask=token < V, other=float("-inf")).to(tl.float32)
    peak = tl.max(x, 0)
    base = tl.where(peak > float("-inf"), peak, 0.0)
    tl.store(peaks + n * parts + part, peak)
    tl.store(masses + n * parts + part, tl.sum(tl.exp(x - base), 0))
    tl.store(above + n * parts + part, tl.sum((x > own).to(tl.int32), 0))


@triton.jit(do_not_specialize=["k"])
def _rank(
    logits, chosen, peaks, masses, above, best, best_ids, ids, values, rank, stride, parts, k,
    LOGITS: tl.constexpr, PP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """A row's columns: the chosen token, then the k best; of logprobs, or LOGITS as they are."""
    n = tl.program_id(0).to(tl.int64)
    part, column = tl.arange(0, PP), tl.arange(0, KP)
    peak = tl.load(peaks + n * parts + part, mask=part < parts, other=float("-inf"))
    largest = tl.max(peak, 0)
    mass = tl.load(masses + n * parts + part, mask=part < parts, other=0.0)
    scaled = tl.where(peak > float("-inf"), mass * tl.exp(peak - largest), 0.0)
    shift = 0.0 if LOGITS else largest + tl.log(tl.sum(scaled, 0))
    token = tl.load(chosen + n)
    tl.store(ids + n * (k + 1), token)
    tl.store(values + n * (k + 1), tl.load(logits + n * stride + token).to(tl.float32) - shift)
    tl.store(rank + n, 1 + tl.sum(tl.load(above + n * parts + part, mask=part < parts, other=0), 0).to(tl.int64))
    there = column < k
    to = n * (k + 1) + 1 + column
    tl.store(ids + to, tl.load(best_ids + n * k + column, mask=there, other=0), mask=there)
    tl.store(values + to, tl.load(best + n * k + column, mask=there, other=0.0) - shift, mask=there)


# ---- launches ----------------------------------------------------------------------------------------------------


def _is_exact() -> bool:
    """Compiled kernels use the logarithms that torch uses on a GPU; the interpreter has none of them."""
    return os.environ.get("TRITON_INTERPRET", "0") != "1"


def _scratch(logits: torch.Tensor, columns: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(logits.shape[0], columns, dtype=dtype, device=logits.device)


def _finish(
    logits: torch.Tensor, random: bool, slot: torch.Tensor, position: torch.Tensor, temperature: torch.Tensor,
    key: torch.Tensor, floors: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Two launches: every part's best token, then the row's → tokens int64 [N], bad bool [N]."""
    count, vocab = logits.shape
    parts = triton.cdiv(vocab, PART)
    tokens, bad = (torch.empty(count, dtype=kind, device=logits.device) for kind in (torch.int64, torch.bool))
    if count:
        best, token = (_scratch(logits, parts) for _ in range(2))
        _draw_part[(count, parts)](
            logits, slot, position, temperature, key, slot if floors is None else floors, best, token, vocab, logits.stride(0),
            parts, RANDOM=random, FILTERS=floors is not None, EXACT=_is_exact(), PART=PART, num_warps=8,
        )  # fmt: skip
        _pick[(count,)](best, token, tokens, bad, parts, PP=triton.next_power_of_2(parts), num_warps=1)
    return tokens, bad


def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, V] any float dtype → int64 [N]: the first of the largest, where NaN counts as largest; and bool [N] as in `sample`."""
    return _finish(logits, False, logits, logits, logits, logits)


def sample(
    logits: torch.Tensor, slot: torch.Tensor, position: torch.Tensor, temperature: torch.Tensor, min_p: torch.Tensor,
    top_k: torch.Tensor, top_p: torch.Tensor, key: torch.Tensor, filters: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Every logits row as its slot asks: logits [N, V] any float dtype, after all transforms but temperature; slot int64 [N],
    position int64 [N]; of the slots temperature float32 [S] (0: greedy), min_p float32 (0: off), top_k int32 (0: off), top_p
    float32 (1: off), key int32 [S, 2]. `filters` False: no row of the batch uses min_p, top_k or top_p. → tokens int64 [N],
    and bool [N] where the row had NaN or nothing allowed. Two launches, six with filters; capturable, no host read."""
    floors = _kept_from(logits, slot, temperature, min_p, top_k, top_p) if filters and len(logits) else None
    return _finish(logits, True, slot, position, temperature, key, floors)


def filtered(
    logits: torch.Tensor, slot: torch.Tensor, temperature: torch.Tensor, min_p: torch.Tensor, top_k: torch.Tensor,
    top_p: torch.Tensor, filters: bool = True,
) -> torch.Tensor:  # fmt: skip
    """What `sample` draws from: logits / temperature, -inf where they are not kept, float32 [N, V]. Greedy rows have temperature
    1. A launch, five with filters."""
    temperature = torch.where(temperature > 0, temperature, 1.0)
    floors = _kept_from(logits, slot, temperature, min_p, top_k, top_p) if filters else slot
    count, vocab = logits.shape
    out = _scratch(logits, vocab, torch.float32)
    _keep_part[(count, triton.cdiv(vocab, PART))](
        logits, slot, temperature, floors, out, vocab, logits.stride(0), FILTERS=filters, PART=PART, num_warps=8
    )
    return out


def _kept_from(
    logits: torch.Tensor, slot: torch.Tensor, temperature: torch.Tensor, min_p: torch.Tensor, top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The keys int32 [N] of the smallest scaled logits that the rows keep."""
    count, vocab = logits.shape
    parts = triton.cdiv(vocab, PART)
    peaks, table, found, listed, floors = (_scratch(logits, n) for n in (parts, BINS, 1, ROOM, 1))
    mass, heavier = (_scratch(logits, parts, torch.int64) for _ in range(2))
    grid, padded, exact = (count, parts), triton.next_power_of_2(parts), _is_exact()
    settings = (logits, slot, temperature, min_p, top_k, top_p, peaks, table)
    sizes = (vocab, logits.stride(0), parts)
    _peak_part[grid](logits, slot, temperature, peaks, table, found, *sizes, BINS=BINS, PART=PART, num_warps=8)
    _coarse[grid](*settings, mass, *sizes, BINS=BINS, PART=PART, PP=padded, EXACT=exact, num_warps=8)
    _compact[grid](
        *settings, found, listed, heavier, *sizes, BINS=BINS, PART=PART, PP=padded, ROOM=ROOM, EXACT=exact, num_warps=8
    )
    _floors[(count,)](
        *settings, mass, found, listed, heavier, floors, *sizes, BINS=BINS, PP=padded, ROOM=ROOM, EXACT=exact, BLOCK=PART,
        num_warps=16,
    )  # fmt: skip
    return floors


def rank(
    logits: torch.Tensor, chosen: torch.Tensor, k: int, as_they_are: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits float32 [n, V], chosen int64 [n] → token ids int64 and logprobs, or logits `as_they_are`, float32 [n, 1 + k]: the
    chosen one, then the best; and int64 [n], 1 + how many are larger than the chosen one."""
    count, vocab = logits.shape
    parts = triton.cdiv(vocab, PART)
    peaks, masses = (_scratch(logits, parts, torch.float32) for _ in range(2))
    above, ids = _scratch(logits, parts), _scratch(logits, 1 + k, torch.int64)
    values, place = _scratch(logits, 1 + k, torch.float32), torch.empty(count, dtype=torch.int64, device=logits.device)
    best, best_ids = logits.topk(k, -1) if k else (logits, chosen)
    _rank_part[(count, parts)](logits, chosen, peaks, masses, above, vocab, logits.stride(0), parts, PART=PART, num_warps=8)
    _rank[(count,)](
        logits, chosen, peaks, masses, above, best, best_ids, ids, values, place, logits.stride(0), parts, k,
        LOGITS=as_they_are, PP=triton.next_power_of_2(parts), KP=triton.next_power_of_2(max(1, k)), num_warps=1,
    )  # fmt: skip
    return ids, values, place
