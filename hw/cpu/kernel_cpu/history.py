"""Ops that plugins define on the tokens of the requests, in one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_core.nn.api import StepView
from kernel_cpu import build


def penalise(logits: Tensor, index: Tensor, step: StepView, numbers: Tensor) -> Tensor:
    """The op `penalise` of the penalties."""
    drafts, ancestors = step.drafts.contiguous(), step.ancestors.contiguous()
    pointers = (index, step.slot, step.row, step.history)
    build.library().kc_penalise(
        logits.data_ptr(), logits.stride(0), *(x.data_ptr() for x in pointers), step.history.stride(0), step.known.data_ptr(),
        step.num_prompt.data_ptr(), ancestors.data_ptr(), drafts.data_ptr(), drafts.stride(0), ancestors.shape[1],
        numbers.data_ptr(), step.max_len, len(index), logits.shape[1],
    )  # fmt: skip
    return logits


def ban(logits: Tensor, bans: Tensor, step: StepView) -> Tensor:
    """The op `ban` of the logit rules."""
    drafts, ancestors, bans = step.drafts.contiguous(), step.ancestors.contiguous(), bans.contiguous()
    pointers = (bans, step.slot, step.row, step.position, step.history)
    build.library().kc_ban(
        logits.data_ptr(), logits.stride(0), *(x.data_ptr() for x in pointers), step.history.stride(0), step.known.data_ptr(),
        step.num_prompt.data_ptr(), ancestors.data_ptr(), drafts.data_ptr(), drafts.stride(0), ancestors.shape[1],
        bans.shape[1] - 3, len(bans),
    )  # fmt: skip
    return logits


def look_up(history: Tensor, slots: Tensor, known: Tensor, length: int, least: int, most: int, number: int) -> Tensor:
    """The op `look_up` of the n-gram drafter."""
    out = torch.empty(len(slots), number, dtype=torch.int64)
    slots, known = slots.contiguous(), known.contiguous()
    pointers = (slots.data_ptr(), known.data_ptr(), out.data_ptr())
    build.library().kc_look_up(history.data_ptr(), history.stride(0), *pointers, length, least, most, number, len(slots))
    return out
