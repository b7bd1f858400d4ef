"""The op `ban`, and its reference."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_core.nn.api import StepView

ANY = -2  # in a prefix: every token, and none
NO_OUTPUT = -1  # in a tail: the output is not that long


def ban(logits: Tensor, bans: Tensor, step: StepView) -> Tensor:
    """`ban(logits [N, V] float32, bans [P, 3 + K] int64, step) → logits`, in place; facts: vocab_size.

    A ban is a logits row, a token below V, a number and a prefix: the token gets -inf in that row while fewer than the number of
    tokens are out and the output ends with the prefix (ANY: whatever there is). The drafts before the row are output. Rate:
    step."""
    row, token, until, prefix = bans[:, 0], bans[:, 1], bans[:, 2], bans[:, 3:]
    out = step.position[row] - step.num_prompt[step.slot[row]]
    ends = ((output_tail(step, row, prefix.shape[1]) == prefix) | (prefix == ANY)).all(1)
    change = torch.where((out < until) & ends, float("-inf"), float("inf"))
    logits.view(-1).scatter_reduce_(0, row * logits.shape[1] + token, change, "amin")
    return logits


def output_tail(step: StepView, rows: Tensor, width: int) -> Tensor:
    """The last `width` output tokens before each of some logits rows [n], drafts on its path included → [n, width]."""
    slot, before = step.slot[rows], step.ancestors[rows].long()
    back = torch.arange(width, 0, -1, device=rows.device)  # 1: the last token
    count = (before >= 0).sum(-1, keepdim=True)
    place = step.known[slot, None].long() - (back - count)
    known = step.history[slot[:, None], place.clamp(min=0, max=step.history.shape[1] - 1)].long()
    tail = torch.where(place >= step.num_prompt[slot, None], known, NO_OUTPUT)
    if not before.shape[1]:
        return tail
    number = before.gather(1, (count - back).clamp(min=0)).clamp(min=0)
    return torch.where(back <= count, step.drafts[step.row[rows]].gather(1, number), tail)
