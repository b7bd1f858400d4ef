"""What is read from the requests' own tokens: penalties on those that occurred, bans after them, drafts from what followed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.core import constexpr

from kernel_core.nn.api import StepView

_ANY, _NO_OUTPUT = constexpr(-2), constexpr(-1)  # of the op `ban`
BLOCK = 1024  # tokens that a program looks at


@triton.jit(do_not_specialize=["columns"])
def _count(
    index, slots, rows, history, known, num_prompt, ancestors, drafts, counts,
    stride, columns, width, ancestors_stride, drafts_stride, V, BLOCK: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Bit 0 of counts [n, V]: the token is in the prompt; the others: how often it is in the output."""
    i, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(index + i)
    slot = tl.load(slots + n)
    place = part * BLOCK + tl.arange(0, BLOCK)
    held = place < tl.minimum(tl.load(known + slot), columns)
    token = tl.load(history + slot * stride + place, mask=held, other=0)
    prompt = tl.load(num_prompt + slot)
    tl.atomic_or(counts + i * V + token, 1, mask=held & (place < prompt), sem="relaxed")
    tl.atomic_add(counts + i * V + token, 2, mask=held & (place >= prompt), sem="relaxed")
    if part == 0:
        draft, there = _before(n, rows, ancestors, drafts, width, ancestors_stride, drafts_stride, W)
        tl.atomic_add(counts + i * V + draft, 2, mask=there, sem="relaxed")


@triton.jit
def _before(n, rows, ancestors, drafts, width, ancestors_stride, drafts_stride, W: tl.constexpr):
    """The drafts before a logits row, and which of them there are."""
    w = tl.arange(0, W)
    draft = tl.load(ancestors + n * ancestors_stride + w, mask=w < width, other=-1)
    token = tl.load(drafts + tl.load(rows + n) * drafts_stride + draft, mask=draft >= 0, other=-1)
    return tl.maximum(token, 0), token >= 0


@triton.jit
def _penalise_once(logits, counts, token, there, presence, frequency, repetition):
    """Whoever takes a token's count changes its logit."""
    count = tl.atomic_xchg(counts + token, 0, mask=there, sem="relaxed")
    mine = there & (count != 0)
    x = tl.load(logits + token, mask=mine, other=0.0)
    x = tl.where(x > 0, tl.div_rn(x, repetition), x * repetition)
    times = count >> 1
    x = x - frequency * times.to(tl.float32) - presence * (times > 0).to(tl.float32)
    tl.store(logits + token, x, mask=mine)


@triton.jit(do_not_specialize=["columns"])
def _penalise(
    logits, index, slots, rows, history, known, ancestors, drafts, counts, numbers,
    logits_stride, stride, columns, width, ancestors_stride, drafts_stride, V, BLOCK: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    i, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n = tl.load(index + i)
    slot = tl.load(slots + n)
    presence, frequency = tl.load(numbers + slot * 3), tl.load(numbers + slot * 3 + 1)
    repetition = tl.load(numbers + slot * 3 + 2)
    place = part * BLOCK + tl.arange(0, BLOCK)
    held = place < tl.minimum(tl.load(known + slot), columns)
    token = tl.load(history + slot * stride + place, mask=held, other=0)
    row, mine = logits + n * logits_stride, counts + i * V
    _penalise_once(row, mine, token, held, presence, frequency, repetition)
    if part == 0:
        draft, there = _before(n, rows, ancestors, drafts, width, ancestors_stride, drafts_stride, W)
        _penalise_once(row, mine, draft, there, presence, frequency, repetition)


@triton.jit(do_not_specialize=["P", "K"])
def _ban(
    logits, bans, slots, rows, positions, history, known, num_prompt, ancestors, drafts,
    P, K, logits_stride, stride, width, ancestors_stride, drafts_stride, BLOCK: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """-inf for the tokens of the bans [P, 3 + K] that hold."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < P
    ban = bans + i.to(tl.int64) * (3 + K)
    n, token = tl.load(ban, mask=there, other=0), tl.load(ban + 1, mask=there, other=0)
    until = tl.load(ban + 2, mask=there, other=0)
    slot = tl.load(slots + n, mask=there, other=0)
    prompt = tl.load(num_prompt + slot, mask=there, other=0).to(tl.int64)
    held = tl.load(known + slot, mask=there, other=0).to(tl.int64)
    w = tl.arange(0, W)
    before = tl.load(ancestors + n[:, None] * ancestors_stride + w[None, :], mask=there[:, None] & (w < width)[None, :], other=-1)
    count = tl.sum((before >= 0).to(tl.int32), 1)
    holds = there & (tl.load(positions + n, mask=there, other=0) - prompt < until)
    own = drafts + tl.load(rows + n, mask=there, other=0) * drafts_stride
    for k in range(0, K):
        back = K - k - count  # tokens before the drafts; 0 and less: a draft
        wanted = tl.load(ban + 3 + k, mask=there, other=_ANY)
        place = held - back
        is_old = holds & (back > 0) & (place >= prompt)
        old = tl.load(history + slot * stride + place, mask=is_old, other=_NO_OUTPUT).to(tl.int64)
        draft = tl.load(ancestors + n * ancestors_stride - back, mask=holds & (back <= 0), other=0).to(tl.int64)
        new = tl.load(own + tl.maximum(draft, 0), mask=holds & (back <= 0), other=_NO_OUTPUT)
        holds = holds & ((wanted == _ANY) | (tl.where(back > 0, old, new) == wanted))
    tl.store(logits + n * logits_stride + token, float("-inf"), mask=holds)


@triton.jit(do_not_specialize=["length"])
def _look_up(
    history, slots, known, out, stride, length, least, most, number, BLOCK: tl.constexpr, NP: tl.constexpr,
):  # fmt: skip
    """One program per row: the place where the longest run of tokens like the last ones ends, the last such place."""
    row = tl.program_id(0).to(tl.int64)
    tokens = history + tl.load(slots + row) * stride
    last = tl.load(known + row).to(tl.int32) - 1
    best = tl.full([], -1, tl.int32)
    for begin in range(0, tl.minimum(last, length), BLOCK):
        place = begin + tl.arange(0, BLOCK)
        alike = place < tl.minimum(last, length)
        run = tl.zeros([BLOCK], tl.int32)
        for back in range(0, most):
            here = alike & (place >= back)
            wanted = tl.load(tokens + tl.maximum(last - back, 0))
            alike = here & (tl.load(tokens + place - back, mask=here, other=-1) == wanted)
            run += alike.to(tl.int32)
        best = tl.maximum(best, tl.max(tl.where(run >= least, run * length + place, -1), 0))
    end = best % length
    k = tl.arange(0, NP)
    follows = end + 1 + k % tl.maximum(last - end, 1)
    token = tl.load(tokens + tl.minimum(follows, length - 1), mask=k < number, other=-1)
    tl.store(out + row * number + k, tl.where(best < 0, -1, token).to(tl.int64), mask=k < number)


# ---- launches ----------------------------------------------------------------------------------------------------


def penalise(
    logits: torch.Tensor, index: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, history: torch.Tensor,
    known: torch.Tensor, num_prompt: torch.Tensor, ancestors: torch.Tensor, drafts: torch.Tensor, numbers: torch.Tensor,
    counts: torch.Tensor, columns: int,
) -> None:  # fmt: skip
    """The logits rows index int64 [n] of logits [N, V] float32, in place. slots and rows int64 [N]: the slot and the step's row
    of a logits row; history int32 [S, L], of which at most `columns` tokens are read; known and num_prompt int32 [S]; ancestors
    int32 [N, W] into drafts int64 [R, W], -1: none; numbers float32 [S, 3], presence, frequency and repetition; counts int32
    [n or more, V], all zero, and so again afterwards. Two launches."""
    grid = (len(index), max(1, triton.cdiv(columns, BLOCK)))
    width = ancestors.shape[1]
    strides = (history.stride(0), columns, width, ancestors.stride(0), drafts.stride(0), logits.shape[1])
    sizes = {"BLOCK": BLOCK, "W": triton.next_power_of_2(max(1, width)), "num_warps": 4}
    _count[grid](index, slots, rows, history, known, num_prompt, ancestors, drafts, counts, *strides, **sizes)
    _penalise[grid](
        logits, index, slots, rows, history, known, ancestors, drafts, counts, numbers, logits.stride(0), *strides, **sizes,
        enable_fp_fusion=False,
    )  # fmt: skip


def ban(logits: torch.Tensor, bans: torch.Tensor, step: StepView) -> torch.Tensor:
    """The op `ban` of the logit rules: logits [N, V] float32, in place; bans int64 [P, 3 + K]. One launch."""
    (count, columns), block, width = bans.shape, 64, step.ancestors.shape[1]
    strides = (logits.stride(0), step.history.stride(0), width, step.ancestors.stride(0), step.drafts.stride(0))
    _ban[(triton.cdiv(count, block),)](
        logits, bans.contiguous(), step.slot, step.row, step.position, step.history, step.known, step.num_prompt, step.ancestors,
        step.drafts, count, columns - 3, *strides, BLOCK=block, W=triton.next_power_of_2(max(1, width)), num_warps=2,
    )  # fmt: skip
    return logits


def look_up(
    history: torch.Tensor, slots: torch.Tensor, known: torch.Tensor, length: int, least: int, most: int, number: int
) -> torch.Tensor:
    """history int32 [S, L], slots and known int64 [n] → int64 [n, number]: what followed the last n-gram of `least` to `most`
    tokens that is like that before `known`, within the first `length` tokens; -1 where there is none."""
    out = torch.empty(len(slots), number, dtype=torch.int64, device=history.device)
    if len(slots):
        _look_up[(len(slots),)](
            history, slots, known, out, history.stride(0), length, least, most, number, BLOCK=BLOCK,
            NP=triton.next_power_of_2(number), num_warps=4,
        )  # fmt: skip
    return out
