"""The small arrays of a step, a program a row: from the slots to the inputs, from what was drawn back to the slots, and the
inputs of a drafter's passes. All of it is integers; as torch ops it is some hundred launches a step."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _kv_slot(table, slot, place, table_stride, columns, block_size, mask):
    """Cache slots of positions, in the blocks of a slot's own table."""
    column = tl.minimum(place // block_size, columns - 1)
    block = tl.load(table + slot * table_stride + column, mask=mask, other=0).to(tl.int64)
    return block * block_size + place % block_size


@triton.jit
def _copy_table(table, gathered, row, slot, part, table_stride, columns, BLOCK: tl.constexpr):
    column = part * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(table + slot * table_stride + column, mask=column < columns, other=0)
    tl.store(gathered + row.to(tl.int64) * columns + column, ids, mask=column < columns)


@triton.jit(do_not_specialize=["R", "width"])
def rows(
    slots, q_start, room, first, tokens, known, computed, drafts, parents,
    known_out, computed_out, lens, next_token, starts, drafts_out, parents_out,
    row_out, slot_out, draft_out, position, ancestors, logits_token,
    R, width, token_stride, draft_stride, W: tl.constexpr,
):  # fmt: skip
    """What a step reads of each row, and its logits rows. `first` [R + 1]: where a row's logits rows begin."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    begin, end, gains = tl.load(q_start + row), tl.load(q_start + row + 1), tl.load(room + row)
    have, done = tl.load(known + slot), tl.load(computed + slot)
    tl.store(known_out + row, have)
    tl.store(computed_out + row, done)
    tl.store(lens + row, done + (end - begin).to(tl.int32))
    tl.store(next_token + row, tl.load(tokens + slot * token_stride + have - 1).to(tl.int64))
    tl.store(starts + row, begin.to(tl.int32))
    if row == R - 1:
        tl.store(starts + R, end.to(tl.int32))
    j = tl.arange(0, W)
    kept = j < width
    draft = tl.load(drafts + slot * draft_stride + j, mask=kept & (j < gains - 1), other=-1)
    tl.store(drafts_out + row * width + j, draft, mask=kept)
    tl.store(parents_out + row * width + j, tl.load(parents + slot * draft_stride + j, mask=kept, other=-1), mask=kept)
    place, live = tl.load(first + row) + j, j < gains
    tl.store(row_out + place, (row + j * 0).to(tl.int64), mask=live)
    tl.store(slot_out + place, slot + j * 0, mask=live)
    tl.store(draft_out + place, j, mask=live)
    tl.store(position + place, have.to(tl.int64) + j, mask=live)
    tl.store(logits_token + place, end - tl.maximum(gains - 1, 0) - 1 + j, mask=live)
    before = tl.where(j[None, :] < j[:, None], j[None, :], -1)
    tl.store(ancestors + place[:, None] * width + j[None, :], before, mask=live[:, None] & kept[None, :])


@triton.jit(do_not_specialize=["columns", "max_len"])
def tokens_of_rows(
    slots, q_start, room, write_from, tokens, known, computed, drafts, table,
    ids, positions, kv_slots, gathered,
    token_stride, draft_stride, table_stride, columns, block_size, max_len, IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The tokens of each row, and where their KV goes in one group: -1 where it is not to be written."""
    row, part = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + row)
    begin, end, gains = tl.load(q_start + row), tl.load(q_start + row + 1), tl.load(room + row)
    have, done = tl.load(known + slot).to(tl.int64), tl.load(computed + slot).to(tl.int64)
    index = part * BLOCK + tl.arange(0, BLOCK)
    mask = index < end - begin
    number = index - (end - begin - tl.maximum(gains - 1, 0))
    place, is_draft = done + index, number >= 0
    draft = tl.load(drafts + slot * draft_stride + number, mask=mask & is_draft, other=0)
    if IDS:
        own = tl.load(tokens + slot * token_stride + tl.minimum(place, max_len), mask=mask & (number < 0), other=0)
        tl.store(ids + begin + index, tl.where(is_draft, tl.maximum(draft, 0), own.to(tl.int64)), mask=mask)
        tl.store(positions + begin + index, tl.where(is_draft, have + number, place), mask=mask)
    masked = (place < tl.load(write_from + row)) | (is_draft & (draft < 0))
    at = _kv_slot(table, slot, place, table_stride, columns, block_size, mask)
    tl.store(kv_slots + begin + index, tl.where(masked, -1, at), mask=mask)
    _copy_table(table, gathered, row, slot, part, table_stride, columns, BLOCK)


@triton.jit(do_not_specialize=["R", "width", "max_len"])
def accept(
    slots, room, first, draws, unusable, drafts, known_in, lens, tokens, known, computed,
    tokens_out, count_out, accepted_out, path, bad_out, report, numbers,
    R, width, token_stride, max_len, W: tl.constexpr,
):  # fmt: skip
    """Walk each row's drafts along its draws while they are equal, and enter what it gained into its slot."""
    row = tl.program_id(0)
    slot, gains, have = tl.load(slots + row), tl.load(room + row), tl.load(known_in + row)
    j, place = tl.arange(0, W), tl.load(first + row)
    drawn = tl.load(draws + place + j, mask=j < gains, other=-1)
    draft = tl.load(drafts + row * width + j, mask=j < width, other=-1)
    right = (draft == drawn) & (draft >= 0) & (gains > 0)
    accepted = tl.min(tl.where(right, W, j), 0)
    count = tl.where(gains > 0, accepted + 1, 0)
    wrong = tl.load(unusable + place + j, mask=(j < gains) & (j <= accepted), other=0)
    bad = (tl.max(wrong.to(tl.int32), 0) > 0) & (gains > 0)
    tl.store(tokens + slot * token_stride + tl.minimum(have + j, max_len), drawn.to(tl.int32), mask=j < count)
    tl.store(known + slot, have + count)
    after = tl.where(gains > 0, have + accepted, tl.load(lens + row))
    tl.store(computed + slot, after)
    tl.store(tokens_out + row * (width + 1) + j, drawn, mask=j <= width)
    tl.store(report + row * (width + 1) + j, drawn.to(tl.int32), mask=j <= width)
    tl.store(path + row * width + j, tl.where(j < accepted, j, -1).to(tl.int64), mask=j < width)
    tl.store(count_out + row, count.to(tl.int64))
    tl.store(accepted_out + row, accepted.to(tl.int64))
    tl.store(bad_out + row, bad.to(tl.int8))
    tl.store(numbers + row, tl.where(bad, 0, count))
    tl.store(numbers + R + row, tl.where(bad, 0, accepted))
    tl.store(numbers + 2 * R + row, tl.sum((draft >= 0).to(tl.int32), 0))
    tl.store(numbers + 3 * R + row, after)
    tl.store(numbers + 4 * R + row, 0)


@triton.jit(do_not_specialize=["width", "draft_width", "max_len"])
def view(
    slots, q_start, room, known_in, computed_in, lens, accepted_in, tokens, known, max_drafts,
    accepted_out, last_token, wanted, known_out, path, settled_out, counted_out, known_wide, sampled,
    width, draft_width, token_stride, max_len, W: tl.constexpr,
):  # fmt: skip
    """What a drafter sees of each row, and what its passes need of it."""
    row = tl.program_id(0)
    slot, gains, accepted = tl.load(slots + row), tl.load(room + row), tl.load(accepted_in + row)
    after, done = tl.load(known + slot), tl.load(computed_in + row).to(tl.int64)
    settled = tl.where(gains > 0, tl.load(known_in + row), tl.load(lens + row)).to(tl.int64) - done
    counted = settled + tl.where(gains > 0, accepted, 0)
    tl.store(accepted_out + row, accepted.to(tl.int32))
    tl.store(last_token + row, tl.load(tokens + slot * token_stride + after - 1).to(tl.int64))
    most = tl.minimum(tl.load(max_drafts + slot), draft_width)
    free = tl.minimum(tl.maximum(max_len - after - 1, 0), most)
    tl.store(wanted + row, tl.where(gains > 0, free, 0))
    tl.store(known_out + row, after)
    tl.store(settled_out + row, settled)
    tl.store(counted_out + row, counted)
    tl.store(known_wide + row, done + counted + 1)
    tl.store(sampled + row, (gains > 0).to(tl.int8))
    j = tl.arange(0, W)
    at = tl.load(q_start + row) + settled - 1 + tl.minimum(j, accepted)
    tl.store(path + row * (width + 1) + j, at, mask=j <= width)


@triton.jit(do_not_specialize=["vocab_size", "width", "row_stride", "column_stride"])
def keep(
    slots, offered, count, wanted, drafts, parents, waiting, vocab_size, width, row_stride, column_stride, draft_stride,
    W: tl.constexpr,
):  # fmt: skip
    """Enter proposed chains into the slots."""
    row, j = tl.program_id(0), tl.arange(0, W)
    slot = tl.load(slots + row)
    mask = j < width
    token = tl.load(offered + row * row_stride + j * column_stride, mask=mask, other=-1)
    live = mask & (j < tl.load(count + row)) & (j < tl.load(wanted + row)) & (token >= 0) & (token < vocab_size)
    tl.store(drafts + slot * draft_stride + j, tl.where(live, token, -1), mask=mask)
    tl.store(parents + slot * draft_stride + j, j - 1, mask=mask)
    tl.store(waiting + row, tl.max(tl.where(live, j + 1, 0), 0).to(tl.int64))


@triton.jit(do_not_specialize=["R", "width", "shift", "columns", "max_len"])
def catch_up(
    slots, q_start, begin, write_from, computed_in, lens_in, settled_in, counted_in, path, tokens, table,
    ids, positions, row_out, source, kv_slots, gathered, last, starts, lens_out,
    R, width, shift, token_stride, table_stride, columns, block_size, max_len, IDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pass of a drafter's layers over what the step computed. `begin` [R + 1]: where a row's tokens of the pass begin."""
    row, part = tl.program_id(0), tl.program_id(1)
    slot, at = tl.load(slots + row), tl.load(begin + row)
    done, settled, counted = tl.load(computed_in + row).to(tl.int64), tl.load(settled_in + row), tl.load(counted_in + row)
    end = tl.load(begin + row + 1)
    index = part * BLOCK + tl.arange(0, BLOCK)
    mask, place = index < end - at, done + index + shift
    valid = (index < counted + 1 - shift) & (place >= tl.load(write_from + row)) & (place < max_len)
    if IDS:
        own = tl.load(tokens + slot * token_stride + tl.minimum(place, max_len), mask=mask, other=0)
        tl.store(ids + at + index, own.to(tl.int64), mask=mask)
        tl.store(positions + at + index, place, mask=mask)
        tl.store(row_out + at + index, (row + index * 0).to(tl.int64), mask=mask)
        before = index + shift - 1
        beyond = tl.minimum(tl.maximum(before - settled + 1, 0), width)
        drafted = tl.load(path + row * (width + 1) + beyond, mask=mask, other=0)
        straight = tl.load(q_start + row) + tl.maximum(before, 0)
        tl.store(source + at + index, tl.where(before < settled, straight, drafted), mask=mask)
        if part == 0:
            tl.store(last + row, at + counted - shift)
            tl.store(starts + row, at.to(tl.int32))
            tl.store(lens_out + row, tl.load(lens_in + row) + 1)
            if row == R - 1:
                tl.store(starts + R, end.to(tl.int32))
    slots_at = _kv_slot(table, slot, place, table_stride, columns, block_size, mask)
    tl.store(kv_slots + at + index, tl.where(valid & (slots_at >= block_size), slots_at, -1), mask=mask)
    _copy_table(table, gathered, row, slot, part, table_stride, columns, BLOCK)


@triton.jit(do_not_specialize=["number", "stride", "columns", "max_len"])
def advance(
    slots, known_wide, sampled, drafts, table, ids, positions, kv_slots, gathered, lens,
    number, stride, table_stride, columns, block_size, max_len, BLOCK: tl.constexpr,
):  # fmt: skip
    """The pass of a drafter's layers over one draft a row."""
    row, part = tl.program_id(0), tl.program_id(1)
    slot, token = tl.load(slots + row), tl.load(drafts + row * stride)
    place = tl.load(known_wide + row) + number
    if part == 0:
        valid = (tl.load(sampled + row) != 0) & (token >= 0) & (place < max_len)
        at = _kv_slot(table, slot, place, table_stride, columns, block_size, True)
        tl.store(ids + row, tl.maximum(token, 0))
        tl.store(positions + row, place)
        tl.store(kv_slots + row, tl.where(valid & (at >= block_size), at, -1))
        tl.store(lens + row, (place + 1).to(tl.int32))
    _copy_table(table, gathered, row, slot, part, table_stride, columns, BLOCK)
