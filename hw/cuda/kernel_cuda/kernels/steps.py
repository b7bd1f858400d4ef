"""The two ends of a decode step in which every row computes and gains one token: from slots to inputs, and from logits back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

REPORT = 7  # rows of a report: token, then tokens gained, accepted, drafted, computed, waiting drafts, and bad
LOOKED_AT = 4096  # logits that one program looks at


@triton.jit
def _begin(rows, tokens, computed, table, token_ids, positions, lens, kv_slots, gathered, padding, token_stride, table_stride,
           columns, block_size, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(rows + row).to(tl.int64)
    place = tl.load(computed + slot)
    tl.store(token_ids + row, tl.load(tokens + slot * token_stride + place).to(tl.int64))
    tl.store(positions + row, place.to(tl.int64))
    tl.store(lens + row, place + 1)
    block = tl.load(table + slot * table_stride + place // block_size).to(tl.int64)
    tl.store(kv_slots + row, tl.where(slot == padding, -1, block * block_size + place % block_size))
    held = place // block_size + 1
    for at in range(0, held, BLOCK):
        column = at + tl.arange(0, BLOCK)
        ids = tl.load(table + slot * table_stride + column, mask=column < held, other=0)
        tl.store(gathered + row.to(tl.int64) * columns + column, ids, mask=column < held)


@triton.jit
def _best_part(logits, best, where, stride, V, parts, BLOCK: tl.constexpr):
    """The largest of a part of a row and its first place; a NaN counts as largest."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits + row * stride + column, mask=column < V, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    largest = tl.max(x, 0)
    tl.store(best + row * parts + part, largest)
    tl.store(where + row * parts + part, tl.min(tl.where((x == largest) & (column < V), column, V), 0))


@triton.jit
def _end(rows, logits, best, where, drawn, tokens, known, computed, report, padding, token_stride, max_len, stride, parts, R,
         GREEDY: tl.constexpr, PP: tl.constexpr):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(rows + row).to(tl.int64)
    if GREEDY:
        part = tl.arange(0, PP)
        values = tl.load(best + row * parts + part, mask=part < parts, other=float("-inf"))
        places = tl.load(where + row * parts + part, mask=part < parts, other=2147483647)
        token = tl.min(tl.where(values == tl.max(values, 0), places, 2147483647), 0)
    else:
        token = tl.load(drawn + row).to(tl.int32)
    value = tl.load(logits + row.to(tl.int64) * stride + token).to(tl.float32)
    bad = (value != value) | (value == float("-inf"))
    before, place = tl.load(known + slot), tl.load(computed + slot)
    gained = (slot != padding).to(tl.int32)
    if slot != padding:
        tl.store(tokens + slot * token_stride + tl.minimum(before, max_len), token)
        tl.store(known + slot, before + 1)
        tl.store(computed + slot, place + 1)
    tl.store(report + row, token)
    tl.store(report + R + row, tl.where(bad, 0, gained))
    tl.store(report + 2 * R + row, 0)
    tl.store(report + 3 * R + row, 0)
    tl.store(report + 4 * R + row, place + 1)
    tl.store(report + 5 * R + row, 0)
    tl.store(report + 6 * R + row, (bad & (slot != padding)).to(tl.int32))


def begin(
    rows: torch.Tensor, tokens: torch.Tensor, computed: torch.Tensor, table: torch.Tensor, padding: int, max_kv: int,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """What a decode step reads, for the slots `rows` int64 [R]: token ids, positions int64 [R], lengths int32 [R], and for the
    group of `table` [S, B] the KV slots int64 [R] (-1 for the slot `padding`) and the rows' own table [R, columns for `max_kv`],
    filled as far as it is held. Capturable."""
    number, columns = len(rows), -(-max_kv // block_size)
    ids, positions, kv_slots = (torch.empty(number, dtype=torch.int64, device=rows.device) for _ in range(3))
    lens = torch.empty(number, dtype=torch.int32, device=rows.device)
    gathered = torch.empty(number, columns, dtype=torch.int32, device=rows.device)
    _begin[(number,)](
        rows, tokens, computed, table, ids, positions, lens, kv_slots, gathered, padding, tokens.stride(0), table.stride(0),
        columns, block_size, BLOCK=512, num_warps=4,
    )  # fmt: skip
    return ids, positions, lens, kv_slots, gathered


def end(
    rows: torch.Tensor, logits: torch.Tensor, drawn: torch.Tensor | None, tokens: torch.Tensor, known: torch.Tensor,
    computed: torch.Tensor, padding: int, max_len: int,
) -> torch.Tensor:  # fmt: skip
    """Take `drawn` int64 [R], or the first largest of logits [R, V], as the next token of each slot; the slot `padding` stays as
    it is. → the report int32 [7, R]. Capturable."""
    number, vocab_size = logits.shape
    report = torch.empty(REPORT, number, dtype=torch.int32, device=rows.device)
    parts, best, where = 1, logits, logits
    if drawn is None:
        parts = triton.cdiv(vocab_size, LOOKED_AT)
        best = torch.empty(number, parts, dtype=torch.float32, device=rows.device)
        where = torch.empty(number, parts, dtype=torch.int32, device=rows.device)
        _best_part[(number, parts)](logits, best, where, logits.stride(0), vocab_size, parts, BLOCK=LOOKED_AT, num_warps=4)
    _end[(number,)](
        rows, logits, best, where, rows if drawn is None else drawn, tokens, known, computed, report, padding, tokens.stride(0),
        max_len, logits.stride(0), parts, number, GREEDY=drawn is None, PP=triton.next_power_of_2(parts), num_warps=1,
    )  # fmt: skip
    return report
