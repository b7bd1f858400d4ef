"""Penalties as a transform. What occurred is read from the token table each step, so there is nothing to undo when a draft is
rejected."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kernel_core.api import Opened, decode
from kernel_core.nn.api import LogitsTransform, StepView, upload

Op = Callable[[Tensor, Tensor, StepView, Tensor], Tensor]


class Penalties(LogitsTransform):
    """Keeps the numbers of the slots; the op `penalise` does the rest."""

    stage = "penalty"
    host = False
    argmax_invariant = False

    def __init__(self, plugin: str, max_slots: int, device: torch.device, penalise: Op) -> None:
        self.plugin, self.device, self._penalise = plugin, device, penalise
        self.watched = np.zeros(max_slots, bool)
        self.numbers = torch.zeros(max_slots, 3, device=device)  # presence, frequency, repetition

    def opened(self, opened: Opened) -> bool:
        payload = opened.payloads.get(self.plugin)
        self.watched[opened.slot] = payload is not None
        if payload is not None:
            given = decode(payload, dict)
            row = [given[name] for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")]
            self.numbers[opened.slot] = upload(np.array(row, np.float32), self.device)
        return payload is not None

    def closed(self, slot: int) -> None:
        self.watched[slot] = False

    def apply(self, logits: Tensor, step: StepView) -> Tensor:
        rows = np.flatnonzero(self.watched[step.host_slot])
        return self._penalise(logits, upload(rows, logits.device), step, self.numbers)
