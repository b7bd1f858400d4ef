"""The drafter: the head reads what the step made known, then runs ahead of it in a chain or a tree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from kernel_core.api import ConfigError, ModelInfo, Opened
from kernel_core.nn.api import DraftBatch, DraftLength, DraftPasses, DraftView, Target, WorkerContext, upload
from kernel_eagle import EagleSection
from kernel_eagle.checkpoint import read_head
from kernel_eagle.heads import FAMILIES, Head
from kernel_eagle.tree import candidates, most_probable

CONVERT = (
    "python -c \"import torch, safetensors.torch as s; s.save_file(torch.load('pytorch_model.bin', weights_only=True), "
    "'model.safetensors')\""
)


class EagleDrafter:
    """Implements `LayeredDrafter`. A chain of m drafts is m passes of the head, a tree one pass a level."""

    lookback, needs_host = 1, False

    def __init__(self, section: EagleSection, context: WorkerContext) -> None:
        self.info = _find(section.head, context)
        self.config = read_head(self.info, section.method, context.model.config)
        self.section, self.tree, self.taps = section, section.tree, self.config.taps
        if section.tree and section.tree_top_k > self.config.draft_vocab:
            raise ConfigError(f"plugins.eagle.tree_top_k = {section.tree_top_k}: the head has {self.config.draft_vocab} tokens")
        self.width, self.max_model_len = section.width, context.max_model_len
        self.ahead = section.tree_top_k * (section.tree_depth - 1) + 1 if section.tree else self.width
        self.length = DraftLength(self.width, context.max_slots, section.tree, keeps_up=True) if section.adaptive else None

    def build(self, target: Target) -> nn.Module:
        info = replace(self.info, config={"head": self.config, "length": self.max_model_len})
        try:
            head = target.load(info, FAMILIES[self.config.method])
            head.settle(target)
        except ConfigError as error:
            method = f"{self.config.method!r} (plugins.eagle.method = {self.section.method!r})"
            raise ConfigError(f"the head {self.info.path}, read as {method}: {error}") from error
        self.head: Head = head
        self._pass = target.graphs(head)
        return head

    def opened(self, opened: Opened) -> None: ...
    def closed(self, slot: int) -> None: ...

    def propose(self, view: DraftView) -> tuple[Tensor, Tensor, Tensor]:
        batch, lengths = view.passes.catch_up(1), self._lengths(view)
        outputs, states = self._run(batch, self.head.states(view.hidden, view.taps)[batch.source])
        tokens = torch.full((len(lengths), self.width), -1, dtype=torch.int64, device=view.known.device)
        parents = torch.arange(-1, self.width - 1, device=tokens.device).expand_as(tokens)
        count = upload(lengths, tokens.device)
        if lengths.any():
            draft = self._tree if self.tree else self._chain
            logits = self.head.logits(outputs[batch.last])
            tokens, parents = draft(view.passes, logits, states[batch.last], count, int(lengths.max()))
        return tokens, parents.int(), count

    def _lengths(self, view: DraftView) -> np.ndarray:
        """[R] int32: how many drafts to propose; none for rows in the middle of their prompt, or that want none."""
        lengths = np.zeros(len(view.host_slots), np.int32)
        rows = np.flatnonzero(view.host_sampled)
        most = np.minimum(view.host_most[rows], self.width)
        lengths[rows] = self.length.lengths(view.host_slots[rows], most) if self.length else most
        return lengths

    def _run(self, batch: DraftBatch, states: Tensor) -> tuple[Tensor, Tensor]:
        """A pair (state i - 1, token i) has the position of its state. Those past the last are not stored, nor used."""
        batch.forward.positions = (batch.forward.positions - 1).clamp(0, self.max_model_len - 1)
        return self._pass(batch.forward, states)

    def _chain(self, passes: DraftPasses, logits: Tensor, states: Tensor, count: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """Each draft is what the request itself would draw from the head's logits."""
        tokens = torch.full((len(count), self.width), -1, dtype=torch.int64, device=logits.device)
        for number in range(longest):
            if number:
                outputs, states = self._run(passes.advance(tokens[:, number - 1], number - 1), states)
                logits = self.head.logits(outputs)
            tokens[:, number] = torch.where(number < count, passes.draw(logits, number), -1)
        return tokens, torch.arange(-1, self.width - 1, device=tokens.device).expand_as(tokens)

    def _tree(self, passes: DraftPasses, logits: Tensor, states: Tensor, count: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        """The nodes' inputs are kept from level to level; a pass computes all of them again, with the new ones."""
        top_k, rows = self.section.tree_top_k, len(count)
        inputs = states[:, None, :][:, :0]  # of the continued nodes: what their parents feed back
        after = states[:, None, :]  # fed back by the last known token, then by each continued node

        def go_on(tokens: Tensor, parents: Tensor) -> Tensor:
            nonlocal inputs, after
            come_from = 1 + parents[:, -top_k:]
            inputs = torch.cat([inputs, after.gather(1, come_from[..., None].expand(-1, -1, states.shape[-1]))], 1)
            batch = passes.expand(torch.where(count[:, None] > 0, tokens, -1), parents)
            outputs, fed_back = self._run(batch, inputs.flatten(0, 1))
            after = torch.cat([states[:, None, :], fed_back.unflatten(0, (rows, -1))], 1)
            last = outputs.unflatten(0, (rows, -1))[:, -top_k:].flatten(0, 1)
            return self.head.logits(last).unflatten(0, (rows, top_k))

        found = candidates(logits, go_on, top_k, self.section.tree_depth)
        tokens, parents = most_probable(*found, self.width)
        return torch.where(count[:, None] > 0, tokens, -1), parents


def _find(name: str, context: WorkerContext) -> ModelInfo:
    try:
        return context.find(name)
    except ConfigError as error:
        raise ConfigError(
            f"plugins.eagle.head = {name!r}: {error}\nA head is read from safetensors. One published as pytorch_model.bin is "
            f"converted once, where you trust it, in its folder: {CONVERT}"
        ) from error
