"""Attention over a paged cache, and the writes into it.

A layer's cache is K [blocks, Hkv, block_size, D] and V [blocks, Hkv, block_size, Dv], in the model's dtype or as the bytes of
e4m3 numbers with a float32 scale per token and head in scales [blocks, Hkv, block_size, 2] (K, V).

The query heads of a KV head are folded into the rows of one product. Short rows (a few queries: decoding, verification) are
cut along their KV into chunks that one program each computes, and `_combine` puts together; long rows (prefill) are cut
along their queries. `_plan` lists both once per step, for all layers. A row's chunks depend on its own length and on how
many rows the step has room for (few rows: shorter chunks), never on the other rows' contents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.core import constexpr

from kernel_cuda.kernels.machine import capability, processors, shared_memory

MAX_CHUNKS = 48  # about the most chunks of a short row
CHUNKS = ((4, 64), (16, 128), (31, 256))  # rows of a step up to which the shortest chunks have so many tokens
CHUNK = 512  # beyond
PROGRAMS = 8  # per multiprocessor, that share the chunks
SHORT = 64  # rows of a product (queries times heads of a group) up to which a row is cut along its KV
LOG2E = constexpr(1.4426950408889634)
PLAIN, BY_BITS, NATIVE = constexpr(0), constexpr(1), constexpr(2)  # how e4m3 is read


@triton.jit
def decode_e4m3(x):
    """The bytes of e4m3 numbers → float16, 1 / 256 of their value (exact)."""
    x = x.to(tl.uint16)
    return (((x & 0x80) << 8) | ((x & 0x7F) << 7)).to(tl.float16, bitcast=True)


@triton.jit
def encode_e4m3(x):
    """float32 within ±448 → the bytes of the nearest e4m3 numbers."""
    bits = (x * 0.00390625).to(tl.float16).to(tl.uint16, bitcast=True)
    size = bits & 0x7FFF
    size = (size + 0x3F + ((size >> 7) & 1)) >> 7
    return (((bits & 0x8000) >> 8) | size).to(tl.uint8)


@triton.jit
def write_heads(x, scale_ptr, cache_ptr, place, scale_place, dims, valid, inside, FP8: tl.constexpr):
    """Store x [H, D] float32 of one token at the cache offsets place [H]; rows `valid`, columns `inside`."""
    keep = valid[:, None] & inside[None, :]
    if FP8:
        size = tl.max(tl.abs(x), 1)
        scale = tl.where(size > 0, size / 448.0, 1.0)
        tl.store(scale_ptr + scale_place, scale, mask=valid)
        quotient = tl.minimum(tl.maximum(x / scale[:, None], -448.0), 448.0)
        tl.store(cache_ptr + place[:, None] + dims[None, :], encode_e4m3(quotient), mask=keep)
    else:
        tl.store(cache_ptr + place[:, None] + dims[None, :], x.to(cache_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _write(
    k_ptr, v_ptr, k_cache, v_cache, scales, slots,
    k_stride, k_head, v_stride, v_head,
    block_size, H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    HP: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        heads, dims, v_dims = tl.arange(0, HP), tl.arange(0, DP), tl.arange(0, DVP)
        ok = heads < H
        row = (slot // block_size * H + heads) * block_size + slot % block_size
        k = tl.load(
            k_ptr + token * k_stride + heads[:, None] * k_head + dims[None, :],
            mask=ok[:, None] & (dims < D)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        write_heads(k, scales, k_cache, row * D, row * 2, dims, ok, dims < D, FP8)
        v = tl.load(
            v_ptr + token * v_stride + heads[:, None] * v_head + v_dims[None, :],
            mask=ok[:, None] & (v_dims < DV)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        write_heads(v, scales, v_cache, row * DV, row * 2 + 1, v_dims, ok, v_dims < DV, FP8)


@triton.jit
def _store_part(x, cache_ptr, at, mask, scale, FP8: tl.constexpr):
    if FP8:
        quotient = tl.minimum(tl.maximum(x / scale[:, None], -448.0), 448.0)
        tl.store(cache_ptr + at, encode_e4m3(quotient), mask=mask)
    else:
        tl.store(cache_ptr + at, x.to(cache_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normal(x, scale, w, NORM: tl.constexpr, OFFSET: tl.constexpr):
    """x [H, N] of heads that are scaled by scale [H]; rounded as the op rms_norm rounds. → float32."""
    kind = x.dtype
    y = x.to(tl.float32)
    if NORM:
        w = w.to(tl.float32)
        if OFFSET:
            y = y * scale[:, None] * (w + OFFSET)[None, :]
        else:
            y = (y * scale[:, None]).to(kind).to(tl.float32) * w[None, :]
        y = y.to(kind).to(tl.float32)
    return y


@triton.jit
def _turned(x, w, heads, H, c, s, eps, D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, HALFP: tl.constexpr,
            RESTP: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """Heads at the pointers x [H], normalised and rotated → the two elements of each pair, those that do not turn (rounded to
    x's type, as float32), and where they stand."""
    d, i, rest = tl.arange(0, DP), tl.arange(0, HALFP), 2 * HALF + tl.arange(0, RESTP)
    kind = x.dtype.element_ty
    ok = (heads < H)[:, None]
    scale = tl.zeros_like(heads).to(tl.float32)
    if NORM:
        whole = tl.load(x[:, None] + d[None, :], mask=ok & (d < D)[None, :], other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole, 1) / D + eps)
    first = 2 * i if INTERLEAVED else i
    second = first + (1 if INTERLEAVED else HALF)
    inside = ok & (i < HALF)[None, :]
    a = tl.load(x[:, None] + first[None, :], mask=inside, other=0.0)
    b = tl.load(x[:, None] + second[None, :], mask=inside, other=0.0)
    a = _normal(a, scale, tl.load(w + first, mask=i < HALF, other=0.0), NORM, OFFSET)
    b = _normal(b, scale, tl.load(w + second, mask=i < HALF, other=0.0), NORM, OFFSET)
    a2 = (a * c[None, :] - b * s[None, :]).to(kind).to(tl.float32)
    b2 = (b * c[None, :] + a * s[None, :]).to(kind).to(tl.float32)
    z = tl.load(x[:, None] + rest[None, :], mask=ok & (rest < D)[None, :], other=0.0)
    z = _normal(z, scale, tl.load(w + rest, mask=rest < D, other=0.0), NORM, OFFSET)
    return a2, b2, z, first, second, rest


@triton.jit
def _prepare(
    q, k, v, cos, sin, positions, q_weight, k_weight, k_cache, v_cache, scales, slots, q_heads,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, eps, block_size,
    H: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
    HALF: tl.constexpr, HALFP: tl.constexpr, RESTP: tl.constexpr, INTERLEAVED: tl.constexpr, NORM: tl.constexpr,
    OFFSET: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    """Norm and rotation of a token's q in place, and of its k, which goes to the cache with v. Grid (tokens, parts): the first
    parts take HEADS query heads each, the others HEADS KV heads."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALFP)
    position = tl.load(positions + token)
    c = tl.load(cos + position * HALF + i, mask=i < HALF, other=0.0)
    s = tl.load(sin + position * HALF + i, mask=i < HALF, other=0.0)
    q_parts = tl.cdiv(q_heads, HEADS)
    if part < q_parts:
        heads = part * HEADS + tl.arange(0, HEADS)
        x = q + token * q_stride + heads * q_head
        a, b, z, first, second, rest = _turned(
            x, q_weight, heads, q_heads, c, s, eps, D, DP, HALF, HALFP, RESTP, INTERLEAVED, NORM, OFFSET
        )
        kind = q.dtype.element_ty
        inside = (heads < q_heads)[:, None] & (i < HALF)[None, :]
        tl.debug_barrier()  # the variance was read from what is overwritten now
        tl.store(x[:, None] + first[None, :], a.to(kind), mask=inside)
        tl.store(x[:, None] + second[None, :], b.to(kind), mask=inside)
        if NORM:
            tl.store(x[:, None] + rest[None, :], z.to(kind), mask=(heads < q_heads)[:, None] & (rest < D)[None, :])
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            heads = (part - q_parts) * HEADS + tl.arange(0, HEADS)
            x = k + token * k_stride + heads * k_head
            a, b, z, first, second, rest = _turned(
                x, k_weight, heads, H, c, s, eps, D, DP, HALF, HALFP, RESTP, INTERLEAVED, NORM, OFFSET
            )
            ok = heads < H
            row = (slot // block_size * H + heads) * block_size + slot % block_size
            scale = tl.zeros_like(heads).to(tl.float32) + 1.0
            if FP8:
                size = tl.maximum(tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1)), tl.max(tl.abs(z), 1))
                scale = tl.where(size > 0, size / 448.0, 1.0)
                tl.store(scales + row * 2, scale, mask=ok)
            inside = ok[:, None] & (i < HALF)[None, :]
            _store_part(a, k_cache, (row * D)[:, None] + first[None, :], inside, scale, FP8)
            _store_part(b, k_cache, (row * D)[:, None] + second[None, :], inside, scale, FP8)
            _store_part(z, k_cache, (row * D)[:, None] + rest[None, :], ok[:, None] & (rest < D)[None, :], scale, FP8)
            dv = tl.arange(0, DVP)
            value = tl.load(
                v + token * v_stride + heads[:, None] * v_head + dv[None, :], mask=ok[:, None] & (dv < DV)[None, :], other=0.0
            ).to(tl.float32)
            write_heads(value, scales, v_cache, row * DV, row * 2 + 1, dv, ok, dv < DV, FP8)


@triton.jit
def chunk_of(first, length, most, shortest):
    """Tokens of a chunk of a row that sees [first, length): even chunks of about `shortest`, or of its doubles where that
    would make more than `most`. A multiple of 64."""
    span = tl.maximum(length - first, 1)
    chunk = tl.zeros_like(length) + shortest
    for _ in tl.static_range(15):
        chunk = tl.where(span > most * chunk, chunk * 2, chunk)
    return tl.cdiv(tl.cdiv(span, tl.cdiv(span, chunk)), 64) * 64


@triton.jit
def first_seen(length, count, window):
    """The first slot that any query of a row may see; window 0: none."""
    return tl.where(window > 0, tl.maximum(length - count - window + 1, 0), 0)


@triton.jit
def _sizes(q_start, kv_len, rows, mask, window, most, shortest, SHORT_Q: tl.constexpr, TILE_Q: tl.constexpr):
    """Chunks and tiles of some rows."""
    count = tl.load(q_start + rows + 1, mask=mask, other=0) - tl.load(q_start + rows, mask=mask, other=0)
    length = tl.load(kv_len + rows, mask=mask, other=0)
    first = first_seen(length, count, window)
    chunk = chunk_of(first, length, most, shortest)
    has_chunks = (count <= SHORT_Q) & (count > 0) & (length > 0)
    chunks = tl.where(has_chunks, tl.cdiv(length, chunk) - first // chunk, 0)
    tiles = tl.where((count > SHORT_Q) & (length > 0), tl.cdiv(count, TILE_Q), 0)
    return chunks, tiles


@triton.jit(do_not_specialize=["num_rows", "window", "most", "shortest", "chunk_room", "tile_room"])
def _plan(
    q_start, kv_len, chunk_start, chunk_row, tile_start, tile_row, num_rows, window, most, shortest, chunk_room, tile_room,
    SHORT_Q: tl.constexpr, TILE_Q: tl.constexpr, RP: tl.constexpr, CP: tl.constexpr,
):  # fmt: skip
    """One program per row, and one more: where its chunks and tiles begin, and the row of each chunk and tile."""
    row = tl.program_id(0)
    rows = tl.arange(0, RP)
    chunks, tiles = _sizes(q_start, kv_len, rows, rows < tl.minimum(row, num_rows), window, most, shortest, SHORT_Q, TILE_Q)
    at_chunk, at_tile = tl.sum(chunks, 0), tl.sum(tiles, 0)
    tl.store(chunk_start + row, tl.minimum(at_chunk, chunk_room))
    tl.store(tile_start + row, tl.minimum(at_tile, tile_room))
    if row < num_rows:
        mine, my_tiles = _sizes(q_start, kv_len, row, row < num_rows, window, most, shortest, SHORT_Q, TILE_Q)
        index = tl.arange(0, CP)
        tl.store(chunk_row + at_chunk + index, row, mask=(index < mine) & (at_chunk + index < chunk_room))
        for at in range(0, my_tiles, CP):
            tl.store(tile_row + at_tile + at + index, row, mask=(at + index < my_tiles) & (at_tile + at + index < tile_room))


@triton.jit
def _scores(q, k, scale, cap, IEEE: tl.constexpr, HAS_CAP: tl.constexpr):
    """q [M, D], k [D, N] → scores in units of log 2."""
    if IEEE:
        s = tl.dot(q, k, input_precision="ieee")
    else:
        s = tl.dot(q, k)
    if HAS_CAP:
        s = (2 * tl.sigmoid(s * (2 * scale / cap)) - 1) * (cap * LOG2E)
    else:
        s = s * (scale * LOG2E)
    return s


@triton.jit
def _load_kv(k_cache, v_cache, scales, block, n, seen, head, d, dv,
             BS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, FP8: tl.constexpr,
             DOT: tl.constexpr):  # fmt: skip
    """k [D, N] and v [N, DV] of the tokens n in `block`, zero where not `seen`; and their scales [N]."""
    row = (block.to(tl.int64) * H + head) * BS + n % BS
    k = tl.load(k_cache + row[None, :] * D + d[:, None], mask=seen[None, :] & (d < D)[:, None], other=0)
    v = tl.load(v_cache + row[:, None] * DV + dv[None, :], mask=seen[:, None] & (dv < DV)[None, :], other=0)
    k_scale, v_scale = 1.0, 1.0
    if FP8:
        k_scale = tl.load(scales + row * 2, mask=seen, other=0.0)
        v_scale = tl.load(scales + row * 2 + 1, mask=seen, other=0.0) * 256.0
        if FP8 == NATIVE:
            k = k.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(DOT)
            v = (v.to(tl.float8e4nv, bitcast=True).to(tl.float16) * 0.00390625).to(DOT)
        else:
            k, v, k_scale = decode_e4m3(k).to(DOT), decode_e4m3(v).to(DOT), k_scale * 256.0
    return k, v, k_scale, v_scale


@triton.jit
def _attend(
    q, acc, m, l, begin, end, table, k_cache, v_cache, scales, tree, head, slot, position, token, count, context, length,
    seen_from, scale, cap, window, tree_width,
    BS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
    FP8: tl.constexpr, IEEE: tl.constexpr, HAS_CAP: tl.constexpr, CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_TREE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the tokens [begin, end) to the running sums of queries [M] at `slot`, `position`, step token `token`."""
    if FP8 and not IEEE:
        q = tl.minimum(tl.maximum(q.to(tl.float32), -65504.0), 65504.0).to(tl.float16)
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    stop = tl.minimum(end, length)
    n = begin + tl.arange(0, BN)
    next_block = tl.load(table + n // BS, mask=(n >= seen_from) & (n < stop), other=0)
    for start in range(begin, end, BN):
        n = start + tl.arange(0, BN)
        held = (n >= seen_from) & (n < stop)
        block = next_block
        ahead = n + BN  # the table is read one turn early, so that the loads of K and V wait for nothing
        next_block = tl.load(table + ahead // BS, mask=ahead < stop, other=0)
        k, v, k_scale, v_scale = _load_kv(k_cache, v_cache, scales, block, n, held, head, d, dv, BS, H, D, DV, FP8, q.dtype)
        if FP8:
            s = _scores(q, k, 1.0, 1.0, IEEE, False) * k_scale[None, :]
            if HAS_CAP:
                s = (2 * tl.sigmoid(s * (2 * scale / (cap * LOG2E))) - 1) * (cap * LOG2E)
            else:
                s = s * scale
        else:
            s = _scores(q, k, scale, cap, IEEE, HAS_CAP)
        if MASKED:
            see = held[None, :] & (slot >= 0)[:, None]
            if HAS_WINDOW:
                near = n[None, :] > position[:, None] - window
                if not CAUSAL:
                    near &= n[None, :] < position[:, None] + window
            if HAS_TREE:
                own = n >= tl.where(count <= tree_width, context, length)
                at = tree + token[:, None].to(tl.int64) * tree_width + (n - context)[None, :]
                link = tl.load(at, mask=see & own[None, :], other=0) != 0
                if HAS_WINDOW:
                    see &= near | own[None, :]
                if CAUSAL:
                    see &= tl.where(own[None, :], link, n[None, :] <= slot[:, None])
            else:
                if HAS_WINDOW:
                    see &= near
                if CAUSAL:
                    see &= n[None, :] <= slot[:, None]
            s = tl.where(see, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(m - base)
        l = l * shrink + tl.sum(p, 1)
        if FP8:
            p = p * v_scale[None, :]
        if IEEE:
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        else:
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        m = top
    return acc, m, l


@triton.jit
def _queries(q_ptr, positions, q_begin, j, count, context, g, head, q_stride, q_head,
             GROUP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, HAS_POSITIONS: tl.constexpr):  # fmt: skip
    """The queries j of group members g [M]: q [M, D], their slots (-1: none), positions and step tokens."""
    d = tl.arange(0, DP)
    ok = (j < count) & (g < GROUP)
    token = tl.where(ok, q_begin + j, q_begin)
    at = token[:, None].to(tl.int64) * q_stride + (head * GROUP + g)[:, None] * q_head + d[None, :]
    q = tl.load(q_ptr + at, mask=ok[:, None] & (d < D)[None, :], other=0.0)
    slot = tl.where(ok, context + j, -1)
    if HAS_POSITIONS:
        position = tl.load(positions + token, mask=ok, other=0).to(tl.int32)
    else:
        position = slot
    return q, slot, position, token, ok


@triton.jit(do_not_specialize=["num_rows", "most", "shortest", "table_stride", "first_slot", "tree_width", "window"])
def _short(
    q_ptr, k_cache, v_cache, scales, table_ptr, q_start, kv_len, chunk_start, chunk_row, tree, positions, part, part_lse,
    num_rows, most, shortest, table_stride, q_stride, q_head, scale, cap, window, first_slot, tree_width,
    BS: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr,
    QS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FP8: tl.constexpr, IEEE: tl.constexpr, HAS_CAP: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TREE: tl.constexpr, HAS_POSITIONS: tl.constexpr,
):  # fmt: skip
    """Chunks of the short rows, one after another in a fixed number of programs → part [chunks, H, QS * GROUP, DV]."""
    work = tl.load(chunk_start + num_rows) * H
    rows, dv = tl.arange(0, BM), tl.arange(0, DVP)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        place, head = item // H, item % H
        row = tl.load(chunk_row + place)
        q_begin = tl.load(q_start + row)
        count = tl.load(q_start + row + 1) - q_begin
        length = tl.load(kv_len + row)
        first = first_seen(length, count, window)
        chunk = chunk_of(first, length, most, shortest)
        begin = (first // chunk + place - tl.load(chunk_start + row)) * chunk
        context = length - count
        q, slot, position, token, ok = _queries(
            q_ptr, positions, q_begin, rows // GROUP, tl.minimum(count, QS), context, rows % GROUP, head, q_stride, q_head,
            GROUP, D, DP, HAS_POSITIONS,
        )  # fmt: skip
        seen_from = tl.maximum(first, first_slot)
        start = tl.maximum(begin, seen_from // BN * BN)
        m = tl.full([BM], float("-inf"), tl.float32)
        l = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DVP], tl.float32)
        acc, m, l = _attend(
            q, acc, m, l, start, tl.minimum(begin + chunk, length), table_ptr + row.to(tl.int64) * table_stride,
            k_cache, v_cache, scales, tree, head, slot, position, token, count, context, length, seen_from,
            scale, cap, window, tree_width, BS,
            H, D, DV, DP, DVP, BN, FP8, IEEE, HAS_CAP, CAUSAL, HAS_WINDOW, HAS_TREE, True,
        )  # fmt: skip
        to = (place * H + head) * (QS * GROUP) + rows
        tl.store(part_lse + to, tl.where(l > 0, m + tl.log2(l), float("-inf")), mask=ok)
        mean = acc / tl.where(l > 0, l, 1.0)[:, None]
        tl.store(part + to[:, None] * DV + dv[None, :], mean, mask=ok[:, None] & (dv < DV)[None, :])


@triton.jit
def _combine(
    part, part_lse, q_start, chunk_start, sinks, out, out_stride, out_head,
    H: tl.constexpr, GROUP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr, QS: tl.constexpr, BC: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """The chunks of a short row, in order → its outputs. Grid (rows, H * GROUP, QS)."""
    row, head, j = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_begin = tl.load(q_start + row)
    count = tl.load(q_start + row + 1) - q_begin
    begin = tl.load(chunk_start + row)
    end = tl.load(chunk_start + row + 1)
    if (j < count) & (count <= QS) & (begin < end):
        dv, step = tl.arange(0, DVP), tl.arange(0, BC)
        m = tl.full([1], float("-inf"), tl.float32)
        l = tl.zeros([1], tl.float32)
        if HAS_SINKS:
            m = tl.zeros([1], tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
            l = tl.full([1], 1.0, tl.float32)
        acc = tl.zeros([DVP], tl.float32)
        for at in range(begin, end, BC):
            place = at + step
            ok = place < end
            source = (place * H + head // GROUP) * (QS * GROUP) + j * GROUP + head % GROUP
            lse = tl.load(part_lse + source, mask=ok, other=float("-inf"))
            x = tl.load(part + source[:, None] * DV + dv[None, :], mask=ok[:, None] & (dv < DV)[None, :], other=0.0)
            top = tl.maximum(m, tl.max(lse, 0))
            base = tl.where(top == float("-inf"), 0.0, top)
            shrink = tl.exp2(m - base)
            weight = tl.exp2(lse - base)
            l = l * shrink + tl.sum(weight, 0)
            acc = acc * shrink + tl.sum(x * weight[:, None], 0)
            m = top
        y = acc / tl.where(l > 0, l, 1.0)
        to = out + (q_begin + j).to(tl.int64) * out_stride + head * out_head + dv
        tl.store(to, y.to(out.dtype.element_ty), mask=dv < DV)


@triton.jit(do_not_specialize=["num_rows", "table_stride", "first_slot", "tree_width", "window"])
def _long(
    q_ptr, k_cache, v_cache, scales, table_ptr, q_start, kv_len, tile_start, tile_row, tree, positions, sinks, out,
    num_rows, table_stride, q_stride, q_head, out_stride, out_head, scale, cap, window, first_slot, tree_width,
    BS: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr,
    DVP: tl.constexpr,
    TQ: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, FP8: tl.constexpr, IEEE: tl.constexpr, HAS_CAP: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_TREE: tl.constexpr, HAS_POSITIONS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """A tile of TQ queries of a long row, all heads of a group. Grid (H, tiles); a row's last, longest tiles come first."""
    head, place = tl.program_id(0), tl.program_id(1)
    if place < tl.load(tile_start + num_rows):
        row = tl.load(tile_row + place)
        q_begin = tl.load(q_start + row)
        count = tl.load(q_start + row + 1) - q_begin
        length = tl.load(kv_len + row)
        context = length - count
        tile = tl.load(tile_start + row + 1) - 1 - place
        rows, dv = tl.arange(0, BM), tl.arange(0, DVP)
        g = rows % GROUP
        j = tl.where(rows < TQ * GROUP, tile * TQ + rows // GROUP, count)
        q, slot, position, token, ok = _queries(
            q_ptr, positions, q_begin, j, count, context, g, head, q_stride, q_head, GROUP, D, DP, HAS_POSITIONS
        )
        if HAS_SINKS:
            m = tl.load(sinks + head * GROUP + g).to(tl.float32) * LOG2E
            l = tl.full([BM], 1.0, tl.float32)
        else:
            m = tl.full([BM], float("-inf"), tl.float32)
            l = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, DVP], tl.float32)
        low = context + tile * TQ  # the tile's first slot
        high = tl.minimum(low + TQ, length)
        first = first_seen(low + 1, 1, window)
        seen_from = tl.maximum(first, first_slot)
        end = length
        whole = seen_from // BN * BN  # up to here every query sees every token
        if CAUSAL:
            if HAS_TREE:
                end = tl.where(count <= tree_width, length, high)
            else:
                end = high
        elif HAS_WINDOW and not HAS_POSITIONS:
            end = tl.minimum(length, high + window - 1)
        start = whole
        if not HAS_WINDOW and not HAS_TREE:
            start = (seen_from + BN - 1) // BN * BN
            if CAUSAL:
                whole = tl.maximum((low + 1) // BN * BN, start)
            else:
                whole = tl.maximum(length // BN * BN, start)
            table = table_ptr + row.to(tl.int64) * table_stride
            if start > seen_from:
                acc, m, l = _attend(
                    q, acc, m, l, start - BN, start, table, k_cache, v_cache, scales, tree, head, slot, position, token,
                    count, context, tl.minimum(length, end), seen_from, scale, cap, window, tree_width, BS,
                    H, D, DV, DP, DVP, BN, FP8, IEEE, HAS_CAP, CAUSAL, HAS_WINDOW, HAS_TREE, True,
                )  # fmt: skip
            acc, m, l = _attend(
                q, acc, m, l, start, whole, table, k_cache, v_cache, scales, tree, head, slot, position, token,
                count, context, length, 0, scale, cap, window, tree_width, BS,
                H, D, DV, DP, DVP, BN, FP8, IEEE, HAS_CAP, CAUSAL, HAS_WINDOW, HAS_TREE, False,
            )  # fmt: skip
        acc, m, l = _attend(
            q, acc, m, l, whole, end, table_ptr + row.to(tl.int64) * table_stride, k_cache, v_cache, scales, tree, head,
            slot, position, token, count, context, length, seen_from, scale, cap, window, tree_width, BS,
            H, D, DV, DP, DVP, BN, FP8, IEEE, HAS_CAP, CAUSAL, HAS_WINDOW, HAS_TREE, True,
        )  # fmt: skip
        y = acc / tl.where(l > 0, l, 1.0)[:, None]
        to = out + token[:, None].to(tl.int64) * out_stride + (head * GROUP + g)[:, None] * out_head + dv[None, :]
        tl.store(to, y.to(out.dtype.element_ty), mask=ok[:, None] & (dv < DV)[None, :])


@triton.jit
def _gather_tokens(cache, slots, out, block_size, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + n)
    d = tl.arange(0, DP)
    row = (slot // block_size * H + head) * block_size + slot % block_size
    tl.store(out + (n * H + head) * D + d, tl.load(cache + row * D + d, mask=d < D), mask=d < D)


@triton.jit
def _gather_kv(
    k_cache, v_cache, slots, k_out, v_out, count, block_size,
    H: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BN tokens of a head. Grid (tokens / BN, H)."""
    n, head = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    slot = tl.load(slots + n, mask=n < count, other=-1)
    row = (slot // block_size * H + head) * block_size + slot % block_size
    to = n.to(tl.int64) * H + head
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    held, inside = (slot >= 0)[:, None], (n < count)[:, None]
    k = tl.load(k_cache + row[:, None] * D + d[None, :], mask=held & (d < D)[None, :], other=0.0)
    tl.store(k_out + to[:, None] * D + d[None, :], k, mask=inside & (d < D)[None, :])
    v = tl.load(v_cache + row[:, None] * DV + dv[None, :], mask=held & (dv < DV)[None, :], other=0.0)
    tl.store(v_out + to[:, None] * DV + dv[None, :], v, mask=inside & (dv < DV)[None, :])


@triton.jit
def _scatter_tokens(cache, slots, values, block_size, H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    n, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slots + n)
    d = tl.arange(0, DP)
    row = (slot // block_size * H + head) * block_size + slot % block_size
    tl.store(cache + row * D + d, tl.load(values + (n * H + head) * D + d, mask=d < D), mask=d < D)


# ---- launches ----------------------------------------------------------------------------------------------------

PART_BYTES = 256 << 20  # of the partial results of a step; rows are cut into fewer chunks rather than to exceed it


@dataclass(frozen=True, slots=True)
class Work:
    """A step's chunks and tiles, for layers with `group` query heads a KV head. `short_q`: queries of the longest row that
    is cut along its KV, `tile_q`: queries of a tile; the room of both lists is fixed by the sizes of the batch."""

    q_start: torch.Tensor
    kv_len: torch.Tensor
    chunk_start: torch.Tensor  # [R + 1]
    chunk_row: torch.Tensor  # [chunk room]
    tile_start: torch.Tensor  # [R + 1]
    tile_row: torch.Tensor  # [tile room]
    most: int
    shortest: int
    short_q: int
    tile_q: int
    has_long: bool


def _room(rows: int, max_kv: int, most: int, shortest: int) -> int:
    return rows * min(most + 2, triton.cdiv(max_kv, shortest) + 2)


def tile_rows(group: int, wide: bool) -> int:
    """Rows of the product of a tile."""
    return max(32 if wide else 128, triton.next_power_of_2(group))


def plan(
    q_start: torch.Tensor, kv_len: torch.Tensor, max_q: int, max_kv: int, tokens: int, group: int, window: int | None,
    row_bytes: int, wide: bool = False,
) -> Work:  # fmt: skip
    """List the work of a step: q_start int32 [R + 1], kv_len int32 [R]; a row of length 0 has none, whatever its queries, and
    `max_q` and `tokens` need not count them. `row_bytes`: of the partial results of one query of all heads, `wide`: float32
    queries. Capturable; one launch."""
    rows = kv_len.shape[0]
    all_short = max_q * group <= SHORT or max_q == 1
    short_q = max(1, max_q) if all_short else 1
    most, shortest = MAX_CHUNKS, next((tokens for few, tokens in CHUNKS if rows <= few), CHUNK)
    while most > 8 and _room(rows, max_kv, most, shortest) * short_q * row_bytes > PART_BYTES:
        most //= 2
    chunk_room = _room(rows, max_kv, most, shortest)
    tile_q = max(1, tile_rows(group, wide) // group)
    tile_room = 0 if all_short else tokens // tile_q + rows
    made = torch.empty(2 * (rows + 1) + chunk_room + tile_room, dtype=torch.int32, device=kv_len.device)
    chunk_start, tile_start, chunk_row, tile_row = made.split([rows + 1, rows + 1, chunk_room, tile_room])
    _plan[(rows + 1,)](
        q_start, kv_len, chunk_start, chunk_row, tile_start, tile_row, rows, window or 0, most, shortest, chunk_room, tile_room,
        SHORT_Q=short_q, TILE_Q=tile_q, RP=triton.next_power_of_2(max(rows, 1)), CP=128, num_warps=4,
    )  # fmt: skip
    return Work(q_start, kv_len, chunk_start, chunk_row, tile_start, tile_row, most, shortest, short_q, tile_q, not all_short)


@dataclass(frozen=True, slots=True)
class Cache:
    """One layer's KV: k [blocks, H, block_size, D], v [blocks, H, block_size, Dv], and for e4m3 (both uint8) the scales
    float32 [blocks, H, block_size, 2]."""

    k: torch.Tensor
    v: torch.Tensor
    scales: torch.Tensor | None = None


def write(cache: Cache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """Store k [T, H, D] and v [T, H, Dv] (heads contiguous) at slots int64 [T]; -1 is not written."""
    tokens, heads, dim = k.shape
    v_dim = v.shape[2]
    if not tokens:
        return
    padded = (triton.next_power_of_2(n) for n in (heads, dim, v_dim))
    _write[(tokens,)](
        k, v, cache.k, cache.v, cache.k if cache.scales is None else cache.scales, slots,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1), cache.k.shape[2], heads, dim, v_dim, *padded,
        FP8=cache.scales is not None, num_warps=4,
    )  # fmt: skip


def prepare(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: Cache, slots: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, interleaved: bool, q_weight: torch.Tensor | None = None, k_weight: torch.Tensor | None = None,
    eps: float = 0.0, offset: int = 0,
) -> None:  # fmt: skip
    """Norm (where there are weights) and rotation of q [T, Hq, D] in place, and of k on its way into the cache; v goes there
    too."""
    tokens, q_heads, dim = q.shape
    heads, v_dim, half = k.shape[1], v.shape[2], cos.shape[1]
    if not tokens:
        return
    part = 8
    padded = {name: triton.next_power_of_2(n) for name, n in (("DP", dim), ("DVP", v_dim), ("HALFP", half))}
    _prepare[(tokens, triton.cdiv(q_heads, part) + triton.cdiv(heads, part))](
        q, k, v, cos, sin, positions, q if q_weight is None else q_weight, q if k_weight is None else k_weight,
        cache.k, cache.v, cache.k if cache.scales is None else cache.scales, slots, q_heads,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), eps, cache.k.shape[2],
        H=heads, HEADS=part, D=dim, DV=v_dim, HALF=half, RESTP=triton.next_power_of_2(max(1, dim - 2 * half)), **padded,
        INTERLEAVED=interleaved, NORM=q_weight is not None, OFFSET=offset, FP8=cache.scales is not None, num_warps=4,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rules:
    """How a layer attends; see `AttentionSpec` of the contract."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    causal: bool = True
    first_slot: int = 0


def attend(
    q: torch.Tensor, cache: Cache, work: Work, block_table: torch.Tensor, rules: Rules, sinks: torch.Tensor | None = None,
    tree: torch.Tensor | None = None, positions: torch.Tensor | None = None, out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """q [T, Hq, D] (heads contiguous) over the cache → [T, Hq, Dv] in q's dtype. Capturable. `out`: where the results of the
    rows go that have work; those of other rows stay."""
    tokens, q_heads, dim = q.shape
    _, heads, block_size, v_dim = cache.v.shape
    if out is None:
        out = torch.empty(tokens, q_heads, v_dim, dtype=q.dtype, device=q.device)
    rows = work.kv_len.shape[0]
    if not tokens or not rows:
        return out
    wide, group = q.dtype == torch.float32, q_heads // heads
    dims = {"D": dim, "DV": v_dim, "DP": max(16, triton.next_power_of_2(dim)), "DVP": max(16, triton.next_power_of_2(v_dim))}
    flags = {
        "FP8": _e4m3_reading(cache), "IEEE": wide, "HAS_CAP": rules.soft_cap is not None, "CAUSAL": rules.causal,
        "HAS_WINDOW": bool(rules.window), "HAS_TREE": tree is not None, "HAS_POSITIONS": positions is not None,
    }  # fmt: skip
    data = (q, cache.k, cache.v, q if cache.scales is None else cache.scales, block_table, work.q_start, work.kv_len)
    extras = (q if tree is None else tree.view(torch.int8), q if positions is None else positions)
    numbers = (
        float(rules.scale), float(rules.soft_cap or 1.0), rules.window or 0, rules.first_slot,
        0 if tree is None else tree.shape[1],
    )  # fmt: skip
    sink = q if sinks is None else sinks
    strides = (block_table.stride(0), q.stride(0), q.stride(1))
    common = {**dims, **flags, "BS": block_size, "H": heads, "GROUP": group}
    if work.has_long:
        _long[(heads, work.tile_row.shape[0])](
            *data, work.tile_start, work.tile_row, *extras, sink, out, rows, *strides, out.stride(0), out.stride(1), *numbers,
            **common, TQ=work.tile_q, HAS_SINKS=sinks is not None,
            **long_shape(dims, work.tile_q * group, wide, shared_memory(q.device), tree is not None),
        )  # fmt: skip
    room = work.chunk_row.shape[0]
    part = torch.empty(room * heads * work.short_q * group, v_dim + 1, dtype=torch.float32, device=q.device)
    part, lse = part.view(-1).split([part.shape[0] * v_dim, part.shape[0]])
    shape = short_shape(dims, group * work.short_q, wide, cache.scales is not None)
    _short[(min(room * heads, PROGRAMS * processors(q.device)),)](
        *data, work.chunk_start, work.chunk_row, *extras, part, lse, rows, work.most, work.shortest, *strides, *numbers,
        **common, QS=work.short_q, **shape,
    )  # fmt: skip
    _combine[(rows, q_heads, work.short_q)](
        part, lse, work.q_start, work.chunk_start, sink, out, out.stride(0), out.stride(1),
        H=heads, GROUP=group, DV=v_dim, DVP=dims["DVP"], QS=work.short_q,
        BC=32, HAS_SINKS=sinks is not None, num_warps=4,
    )  # fmt: skip
    return out


def _e4m3_reading(cache: Cache) -> int:
    if cache.scales is None:
        return PLAIN.value
    return NATIVE.value if capability(cache.k.device) >= (8, 9) else BY_BITS.value


def short_shape(dims: dict[str, int], rows: int, wide: bool, fp8: bool) -> dict[str, int]:
    """Block sizes of `_short`; the best of those measured on an H200 for heads of 128."""
    size = max(dims["DP"], dims["DVP"])
    tokens = 64 if size <= 64 or (fp8 and size <= 128) else 32
    stages = (1 if size > 128 else 2) if wide else 2 if size > 128 else 3 if fp8 else 4
    warps = 2 if fp8 and rows <= 16 else 8 if wide and size > 128 and rows > 16 else 4
    rows = max(16, triton.next_power_of_2(rows))
    return {"BM": rows, "BN": tokens // 2 if wide else tokens, "num_warps": warps, "num_stages": stages}


def long_shape(dims: dict[str, int], rows: int, wide: bool, shared: int, tree: bool) -> dict[str, int]:
    """Block sizes of `_long`; `shared` bytes of memory."""
    size, is_small = max(dims["DP"], dims["DVP"]), shared <= 128 << 10
    tokens = (16 if is_small else 32) if size > 128 else 32 if tree else 64
    stages = (1 if size > 128 else 2) if wide else 2 if size > 128 else 3
    rows = max(16, triton.next_power_of_2(rows))
    return {"BM": rows, "BN": 16 if wide else tokens, "num_warps": 4 if wide else 8, "num_stages": stages}


def gather(cache: Cache, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K [n, H, D] and V [n, H, Dv] of slots int64 [n], zeros where a slot is -1. Not of an e4m3 cache."""
    (_, heads, block_size, dim), v_dim, count = cache.k.shape, cache.v.shape[3], slots.shape[0]
    k, v = (torch.empty(count, heads, d, dtype=cache.k.dtype, device=slots.device) for d in (dim, v_dim))
    if count:
        _gather_kv[(triton.cdiv(count, 16), heads)](
            cache.k, cache.v, slots, k, v, count, block_size, H=heads, D=dim, DV=v_dim, DP=triton.next_power_of_2(dim),
            DVP=triton.next_power_of_2(v_dim), BN=16, num_warps=4,
        )  # fmt: skip
    return k, v


def copy_tokens(cache: Cache, src: torch.Tensor, dst: torch.Tensor) -> None:
    """Copy tokens between slots int64 [n], all read before any is written. Capturable."""
    count = src.shape[0]
    if not count:
        return
    for part in (cache.k, cache.v, cache.scales):
        if part is not None:
            _, heads, block_size, dim = part.shape
            values = torch.empty(count, heads, dim, dtype=part.dtype, device=part.device)
            sizes = {"H": heads, "D": dim, "DP": triton.next_power_of_2(dim), "num_warps": 1}
            _gather_tokens[(count, heads)](part, src, values, block_size, **sizes)
            _scatter_tokens[(count, heads)](part, dst, values, block_size, **sizes)
