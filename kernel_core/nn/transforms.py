"""Runs the logits transforms of a step: host turn masks first, then the stages mask, bias, penalty, temperature.

A transform is asked at opening whether it watches a slot; a step without a slot that it watches costs it nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernel_core.nn.inputs import Layout
from kernel_core.nn.protocols import HostTurn, LogitsTransform, StepView
from kernel_core.nn.transfer import upload
from kernel_core.plan import NO_TOKEN, Opened

STAGES = ("mask", "bias", "penalty", "temperature")
Mask = Callable[[Tensor, Tensor, Tensor], Tensor]
ALL_ONES, NOTHING = np.uint32(0xFFFFFFFF), np.uint32(0)


@dataclass(frozen=True, slots=True)
class MaskRows:
    """Masks that a host turn filled: `words` [n, ceil(V / 32)] for the logits rows `index` [n]."""

    index: np.ndarray
    words: np.ndarray


class Transforms:
    """All transforms of the sampling rank, with the slots each one watches.

    `told` keeps for host transforms what slots gained since their last host turn, and the drafts that wait. `failed`: why a
    host transform ends a slot's request."""

    def __init__(
        self, transforms: Sequence[LogitsTransform], max_slots: int, draft_width: int, vocab_size: int, mask: Mask
    ) -> None:
        self.chain = sorted(transforms, key=lambda t: STAGES.index(t.stage))
        self.watched = np.zeros((len(self.chain), max_slots), bool)
        self.vocab_size, self.width, self._mask = vocab_size, draft_width, mask
        self.has_host = any(t.host for t in self.chain)
        self.failed: dict[int, str] = {}
        self._gained: dict[int, list[np.ndarray]] = {}
        self._drafts = np.full((max_slots, draft_width), NO_TOKEN, np.int32)
        self._parents = np.full((max_slots, draft_width), NO_TOKEN, np.int32)

    def open(self, opened: Opened) -> None:
        for number, transform in enumerate(self.chain):
            self.watched[number, opened.slot] = transform.opened(opened)
        self._gained.pop(opened.slot, None)
        self.failed.pop(opened.slot, None)
        self._drafts[opened.slot] = NO_TOKEN

    def close(self, slot: int) -> None:
        for number, transform in enumerate(self.chain):
            if self.watched[number, slot]:
                transform.closed(slot)
        self.watched[:, slot] = False

    def active(self, rows: np.ndarray, host: bool) -> list[int]:
        """Numbers of the transforms that watch one of these slots."""
        if not self.chain or not len(rows):
            return []
        seen = self.watched[:, rows].any(1)
        return [number for number in np.flatnonzero(seen) if self.chain[number].host == host]

    # ---- host turn

    def learn(self, slot: int, tokens: np.ndarray, drafts: np.ndarray, parents: np.ndarray) -> None:
        """What a finished step did to a slot. Called in step order, only where a host transform watches."""
        self._gained.setdefault(slot, []).append(tokens)
        self._drafts[slot], self._parents[slot] = drafts, parents

    def watches_on_host(self, slot: int) -> bool:
        return any(t.host and self.watched[number, slot] for number, t in enumerate(self.chain))

    def host_turn(self, layout: Layout) -> list[MaskRows]:
        """Let every host transform fill its masks for the step's logits rows. Rate: step, while the forward runs."""
        masks = []
        gained: dict[int, np.ndarray] = {}
        for number in self.active(layout.logits_slot, host=True):
            rows = np.flatnonzero(self.watched[number][layout.logits_slot])
            slots = np.unique(layout.logits_slot[rows])
            for slot in slots:
                if slot not in gained:
                    gained[slot] = np.concatenate([np.zeros(0, np.int32), *self._gained.pop(slot, ())])
            words = np.full((len(slots), 1 + self.width, -(-self.vocab_size // 32)), ALL_ONES)
            turn = HostTurn(slots, [gained[s] for s in slots], self._drafts[slots], self._parents[slots], words)
            self.chain[number].fill(turn)
            self.failed.update(turn.failed)
            words[np.isin(slots, list(turn.failed))] = NOTHING
            place = np.searchsorted(slots, layout.logits_slot[rows])
            masks.append(MaskRows(rows, words[place, layout.logits_draft[rows]]))
        return masks

    # ---- apply

    def step(self, layout: Layout, masks: Sequence[MaskRows], only_argmax: np.ndarray) -> StepTransform | None:
        """What the sampler applies in this step; None: nothing. `only_argmax` [N]: rows of which only the argmax counts."""
        active = []
        for number in self.active(layout.logits_slot, host=False):
            transform = self.chain[number]
            if not (transform.argmax_invariant and only_argmax[self.watched[number][layout.logits_slot]].all()):
                active.append(transform)
        return StepTransform(active, masks, self._mask) if active or masks else None


class StepTransform:
    """Callable (logits [N, V] float32, view) → logits: masks, then the active transforms in stage order."""

    def __init__(self, active: Sequence[LogitsTransform], masks: Sequence[MaskRows], mask: Mask) -> None:
        self.active, self.masks, self._mask = active, masks, mask

    def __call__(self, logits: Tensor, view: StepView) -> Tensor:
        for mask in self.masks:
            self._mask(logits, upload(mask.index, logits.device), upload(mask.words.view(np.int32), logits.device))
        for transform in self.active:
            logits = transform.apply(logits, view)
        return logits


def mask_bits(logits: Tensor, index: Tensor, words: Tensor) -> Tensor:
    """−inf into the rows `index` [n] int64 of logits [N, V] float32, in place, where words [n, ceil(V / 32)] int32 have no bit:
    that of token t is bit t % 32 of word t // 32."""
    bits = torch.arange(32, dtype=torch.int32, device=words.device)
    allowed = ((words[:, :, None] >> bits) & 1).bool().flatten(1)[:, : logits.shape[1]]
    logits[index] = logits[index].masked_fill(~allowed, float("-inf"))
    return logits
