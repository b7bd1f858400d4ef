"""The drafter: which rows are drafted for and how far; what follows is found by one of the two methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kernel_core.api import Opened
from kernel_core.nn.api import DraftLength, DraftView, upload
from kernel_ngram import NgramSection
from kernel_ngram.lookup import PromptLookup
from kernel_ngram.suffix import Suffixes


class Finder(Protocol):
    """Finds what may follow. `needs_host`: it reads tokens on the host."""

    needs_host: bool

    def closed(self, slot: int) -> None: ...
    def find(self, view: DraftView, rows: np.ndarray, number: int) -> Tensor:
        """Rows [n] of the step → [n, number] int64 of what followed before, all -1 where nothing is alike. Rate: step."""
        ...


class NgramDrafter:
    """Implements `Drafter`. It has no weights and reads no states, so it needs no look-back."""

    taps: tuple[str, ...] = ()
    lookback, tree = 0, False

    def __init__(self, section: NgramSection, max_slots: int, look_up: Callable[..., Tensor]) -> None:
        self.width = section.draft_tokens
        self.finder: Finder = (
            PromptLookup(section.min_ngram, section.max_ngram, look_up)
            if section.method == "lookup"
            else Suffixes(section.min_ngram)
        )
        self.needs_host = self.finder.needs_host
        self.length = DraftLength(self.width, max_slots) if section.adaptive else None

    def opened(self, opened: Opened) -> None: ...
    def closed(self, slot: int) -> None:
        self.finder.closed(slot)

    def propose(self, view: DraftView) -> tuple[Tensor, Tensor, Tensor]:
        device = view.known.device
        tokens = torch.full((len(view.host_slots), self.width), -1, dtype=torch.int64, device=device)
        rows, lengths = self._lengths(view)
        if len(rows):
            found = self.finder.find(view, rows, self.width)
            within = torch.arange(self.width, device=device) < upload(lengths, device)[:, None]
            tokens[upload(rows, device)] = found.masked_fill(~within, -1)
        parents = torch.arange(-1, self.width - 1, dtype=torch.int32, device=device)
        return tokens, parents.expand(len(tokens), -1), (tokens >= 0).sum(-1, dtype=torch.int32)

    def _lengths(self, view: DraftView) -> tuple[np.ndarray, np.ndarray]:
        """The rows that drafts are looked for, and how many each."""
        rows = np.flatnonzero(view.host_sampled)
        most = np.minimum(view.host_most[rows], self.width)
        lengths = self.length.lengths(view.host_slots[rows], most) if self.length else most
        return rows[lengths > 0], lengths[lengths > 0]
