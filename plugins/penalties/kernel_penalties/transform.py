"""The penalties on the device. What occurred is read from the token table each step, so there is nothing to undo when a draft is
rejected; only the logits of those tokens are touched, not the whole vocabulary."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernel_core.api import Opened, decode
from kernel_core.nn.api import LogitsTransform, StepView, upload

COUNTS_AT_ONCE = 1 << 22  # counters, in all


class Penalties(LogitsTransform):
    """Repetition first (over prompt and output), then frequency, then presence (over the output, drafts before it included)."""

    stage = "penalty"
    host = False
    argmax_invariant = False

    def __init__(self, plugin: str, max_slots: int, vocab_size: int, device: torch.device) -> None:
        self.plugin, self.vocab_size, self.device = plugin, vocab_size, device
        self.watched = np.zeros(max_slots, bool)
        self.numbers = torch.zeros(max_slots, 3, device=device)  # presence, frequency, repetition
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)  # all zero between two uses

    def opened(self, opened: Opened) -> bool:
        payload = opened.payloads.get(self.plugin)
        self.watched[opened.slot] = payload is not None
        if payload is not None:
            given = decode(payload, dict)
            row = [given[name] for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")]
            self.numbers[opened.slot] = torch.tensor(row, device=self.device)
        return payload is not None

    def closed(self, slot: int) -> None:
        self.watched[slot] = False

    def apply(self, logits: Tensor, step: StepView) -> Tensor:
        rows = np.flatnonzero(self.watched[step.host_slot])
        size = max(1, COUNTS_AT_ONCE // self.vocab_size)
        for at in range(0, len(rows), size):
            index = upload(rows[at : at + size], logits.device)
            tokens, output = occurred(step, index)
            places = index[:, None], tokens
            numbers = self.numbers[step.slot[index]].T[:, :, None]
            logits[places] = penalise(logits[places], self._times(tokens, output), *numbers)
        return logits

    def _times(self, tokens: Tensor, counted: Tensor) -> Tensor:
        """How often each of the tokens [n, P] is among the counted ones of its row [n, P] bool → [n, P] int32."""
        if len(tokens) > len(self._counts):
            self._counts = torch.zeros(len(tokens), self.vocab_size, dtype=torch.int32, device=self.device)
        counts = self._counts[: len(tokens)]
        try:
            return counts.scatter_add_(1, tokens, counted.int()).gather(1, tokens)
        finally:  # also where there was no memory for the result, as the engine goes on then
            counts.scatter_(1, tokens, 0)


def occurred(step: StepView, index: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that a logits row's request has, for some rows [n] → token ids [n, P] int64, and which of them are output, the
    drafts before the row included. Where a row has fewer than P, its first token stands in, as no output."""
    slot = step.slot[index]
    tokens = step.history[slot, : step.max_len].long()
    place = torch.arange(tokens.shape[1], device=tokens.device)
    before = step.ancestors[index].long()
    drafts = step.drafts[step.row[index]].gather(1, before.clamp(min=0))
    held = torch.cat([place < step.known[slot, None], (before >= 0) & (drafts >= 0)], 1)
    output = torch.cat([place >= step.num_prompt[slot, None], before >= 0], 1) & held
    return torch.where(held, torch.cat([tokens, drafts], 1), tokens[:, :1]), output


def penalise(logits: Tensor, times: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor) -> Tensor:
    """Logits [n, P] of tokens that occurred, how often in the output [n, P], numbers [n, 1]."""
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    return repeated - frequency * times - presence * (times > 0)
