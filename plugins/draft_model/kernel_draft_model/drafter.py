"""The drafter: the draft model reads what the step made known, then continues it token by token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from kernel_core.api import Opened
from kernel_core.nn.api import DraftBatch, DraftLength, DraftView, Target, WorkerContext, upload
from kernel_draft_model import DraftModelSection
from kernel_draft_model.vocabulary import translation


class ModelDrafter:
    """Implements `LayeredDrafter`. A chain of m drafts is m passes of the draft model; a step that drafts nothing is one."""

    taps: tuple[str, ...] = ()
    lookback, needs_host, tree = 0, False, False

    def __init__(self, section: DraftModelSection, context: WorkerContext) -> None:
        self.section, self.limit = section, context.max_model_len
        self.width = self.ahead = section.draft_tokens
        self.length = DraftLength(self.width, context.max_slots, keeps_up=True) if section.adaptive else None

    def build(self, target: Target) -> nn.Module:
        info = target.find(self.section.model)
        self.translation = translation(info, target.info, self.section.heterogeneous_vocabulary, target.context.device)
        positions = (info.config.get("text_config") or info.config).get("max_position_embeddings")
        self.limit = min(self.limit, positions or self.limit)
        self.model = target.load(info, None)
        self._pass = target.graphs(self.model)
        return self.model

    def opened(self, opened: Opened) -> None: ...
    def closed(self, slot: int) -> None: ...

    def propose(self, view: DraftView) -> tuple[Tensor, Tensor, Tensor]:
        lengths, device = self._lengths(view), view.known.device
        tokens = torch.full((len(lengths), self.width), -1, dtype=torch.int64, device=device)
        batch = view.passes.catch_up(0)
        hidden = self._run(batch)[batch.last]
        within = torch.arange(self.width, device=device) < self._room(view, upload(lengths, device))[:, None]
        for number in range(int(lengths.max(initial=0))):
            if number:
                hidden = self._run(view.passes.advance(tokens[:, number - 1], number - 1))
            drawn = view.passes.draw(self._logits(hidden), number)
            tokens[:, number] = torch.where(within[:, number], drawn, -1)
        parents = torch.arange(-1, self.width - 1, dtype=torch.int32, device=device)
        return tokens, parents.expand(len(tokens), -1), within.sum(-1, dtype=torch.int32)

    def _lengths(self, view: DraftView) -> np.ndarray:
        """[R] int32: how many drafts to propose; none for rows in the middle of their prompt, or that want none."""
        lengths = np.zeros(len(view.host_slots), np.int32)
        rows = np.flatnonzero(view.host_sampled)
        most = np.minimum(view.host_most[rows], self.width)
        lengths[rows] = self.length.lengths(view.host_slots[rows], most) if self.length else most
        return lengths

    def _room(self, view: DraftView, lengths: Tensor) -> Tensor:
        """[R]: the same within the positions that the draft model was made for."""
        return torch.minimum(lengths, self.limit - view.known).clamp(min=0)

    def _run(self, batch: DraftBatch) -> Tensor:
        """Hidden states [N, H]. Tokens past the last position are not stored, and what comes of them is not used."""
        batch.forward.positions = batch.forward.positions.clamp(max=self.limit - 1)
        if self.translation:
            batch.forward.token_ids = self.translation.reads[batch.forward.token_ids]
        return self._pass(batch.forward)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[R, V] of the target's vocabulary."""
        logits = self.model.logits(hidden)
        return self.translation.logits(logits) if self.translation else logits
