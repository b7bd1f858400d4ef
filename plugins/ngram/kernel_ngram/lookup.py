"""Prompt look-up: the longest n-gram that ends at the last token and was there before, its most recent place, what followed.

https://github.com/apoorvumang/prompt-lookup-decoding describes the idea; here all rows are searched at once, on the device.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernel_core.nn.api import DraftView, upload


class PromptLookup:
    """Searches the token table by the op `look_up`; keeps nothing. N-grams of `least` to `most` tokens."""

    needs_host = False

    def __init__(self, least: int, most: int, op: Callable[..., Tensor]) -> None:
        self.least, self.most, self._look_up = least, most, op

    def closed(self, slot: int) -> None:
        """Nothing is kept of a request."""

    def find(self, view: DraftView, rows: np.ndarray, number: int) -> Tensor:
        index, step = upload(rows, view.known.device), view.step
        # the step's bound does not count the token that the step gained
        return self._look_up(
            step.history, step.rows[index], view.known[index].long(), step.max_len + 1, self.least, self.most, number
        )


def look_up_slots(history: Tensor, slots: Tensor, known: Tensor, length: int, least: int, most: int, number: int) -> Tensor:
    """The op `look_up`: history [S, L] int32, slots [n] int64, of which the first `known` [n] int64 tokens count, at most
    `length` → drafts [n, number] int64, -1 where no n-gram of `least` tokens or more is like the last one. This is its reference.
    Rate: step."""
    return look_up(history[slots, :length], known, least, most, number)


def look_up(tokens: Tensor, known: Tensor, least: int, most: int, number: int) -> Tensor:
    """tokens [n, L], of which the first `known` [n] count → drafts [n, number] int64, -1 where nothing is alike.

    What follows the place that was found goes on until the last token; beyond it the drafts repeat, as the text would if it
    were periodic."""
    length = tokens.shape[1]
    place = torch.arange(length, device=tokens.device)
    alike, run = torch.ones_like(tokens, dtype=torch.bool), torch.zeros_like(tokens, dtype=torch.int64)
    for back in range(min(most, length)):
        wanted = tokens.gather(1, (known - 1 - back).clamp(min=0)[:, None])
        alike[:, :back] = False
        alike[:, back:] &= tokens[:, : length - back] == wanted
        run += alike
    ends_before = place < known[:, None] - 1
    score = torch.where((run >= least) & ends_before, run * length + place, -1)
    best, end = score.max(-1)
    period = (known - 1 - end).clamp(min=1)[:, None]
    follows = end[:, None] + 1 + torch.arange(number, device=tokens.device) % period
    drafts = tokens.gather(1, follows.clamp(max=length - 1)).long()
    return drafts.masked_fill(best[:, None] < 0, -1)
