"""The drafter: the state that produced the newest token, and that token, through the stages."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernel_core.api import ConfigError, Opened
from kernel_core.nn.api import DraftLength, DraftView, Target, upload
from kernel_mlp_speculator import MLPSpeculatorSection
from kernel_mlp_speculator.checkpoint import SpeculatorConfig, check_target, read_config
from kernel_mlp_speculator.module import FAMILY, Stages
from kernel_mlp_speculator.tree import candidates, most_probable

TREE_SIZE = 8


class SpeculatorDrafter:
    """Implements `LayeredDrafter`; the stages keep no KV, so nothing is written ahead. `width` is settled by `build`."""

    taps: tuple[str, ...] = ()
    lookback, ahead, needs_host = 1, 0, False

    def __init__(self, section: MLPSpeculatorSection, max_slots: int) -> None:
        self.section, self.tree, self.max_slots = section, section.tree, max_slots
        self.width = section.draft_tokens or 1
        self.length: DraftLength | None = None

    def build(self, target: Target) -> Stages:
        info = target.find(self.section.head)
        config = read_config(info)
        check_target(config, target.info.config)
        self.width = draft_tokens(config, self.section)
        if self.section.adaptive:
            self.length = DraftLength(self.width, self.max_slots, self.tree)
        self.stages = target.load(info, FAMILY)
        return self.stages

    def opened(self, opened: Opened) -> None: ...
    def closed(self, slot: int) -> None: ...

    def propose(self, view: DraftView) -> tuple[Tensor, Tensor, Tensor]:
        rows, device = len(view.host_slots), view.known.device
        tokens = torch.full((rows, self.width), -1, dtype=torch.int64, device=device)
        parents = torch.arange(-1, self.width - 1, device=device).repeat(rows, 1)
        drafting, lengths = self._lengths(view)
        if len(drafting):
            index = upload(drafting, device)
            state = self.stages.first(view.hidden[view.path[index, -1]])
            draft = self._tree if self.tree else self._chain
            drafts, parents[index] = draft(view, index, state, int(lengths.max()))
            within = torch.arange(self.width, device=device) < upload(lengths, device)[:, None]
            tokens[index] = drafts.masked_fill(~within, -1)
        return tokens, parents.int(), (tokens >= 0).sum(-1, dtype=torch.int32)

    def _lengths(self, view: DraftView) -> tuple[np.ndarray, np.ndarray]:
        """The rows that are drafted for, and how many drafts each."""
        rows = np.flatnonzero(view.host_sampled)
        most = np.minimum(view.host_most[rows], self.width)
        lengths = self.length.lengths(view.host_slots[rows], most) if self.length else most
        return rows[lengths > 0], lengths[lengths > 0]

    def _chain(self, view: DraftView, index: Tensor, state: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """`number` stages, each with the token that the request itself would draw from the stage before."""
        token = view.last_token[index]
        drafts = torch.full((len(index), self.width), -1, dtype=torch.int64, device=token.device)
        for place in range(number):
            state, logits = self.stages(place, state, token)
            token = _own_draw(view, index, logits, place)
            drafts[:, place] = token
        return drafts, torch.arange(-1, self.width - 1, device=token.device).expand_as(drafts)

    def _tree(self, view: DraftView, index: Tensor, state: Tensor, number: int) -> tuple[Tensor, Tensor]:
        return most_probable(*candidates(self.stages, state, view.last_token[index]), self.width)


def _own_draw(view: DraftView, index: Tensor, logits: Tensor, place: int) -> Tensor:
    """What the rows `index` [n] would draw at draft `place` from logits [n, V]; greedy where the kernel offers no draws."""
    if view.passes is None:
        return logits.argmax(-1)
    rows = len(view.host_slots)
    if len(index) == rows:
        return view.passes.draw(logits, place)
    every = logits.new_zeros(rows, logits.shape[1])
    every[index] = logits
    return view.passes.draw(every, place)[index]


def draft_tokens(config: SpeculatorConfig, section: MLPSpeculatorSection) -> int:
    """Most drafts a step. Raises ConfigError for more than the checkpoint can draft."""
    most, usual = (config.tree_size, TREE_SIZE) if section.tree else (config.n_predict, config.n_predict)
    asked = section.draft_tokens or min(usual, most)
    if asked > most:
        what = "candidates its tree has" if section.tree else "tokens it predicts (n_predict)"
        raise ConfigError(f"plugins.mlp_speculator.draft_tokens = {asked} is more than the {most} {what}: ask for fewer")
    return asked
