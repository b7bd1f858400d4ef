"""The penalties on the device. Counts are made from the token table each step: nothing to undo when a draft is rejected."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernel_core.api import Opened, decode
from kernel_core.nn.api import LogitsTransform, StepView, upload

COUNTS_AT_ONCE = 1 << 22  # counters that are alive at a time


class Penalties(LogitsTransform):
    """Repetition first (over prompt and output), then frequency, then presence (over the output, drafts before it included)."""

    stage = "penalty"
    host = False
    argmax_invariant = False

    def __init__(self, plugin: str, max_slots: int, vocab_size: int, device: torch.device) -> None:
        self.plugin, self.vocab_size, self.device = plugin, vocab_size, device
        self.watched = np.zeros(max_slots, bool)
        self.numbers = torch.zeros(max_slots, 3, device=device)  # presence, frequency, repetition

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
            slot = step.slot[index]
            prompt, output = count_tokens(step, index, self.vocab_size)
            logits[index] = penalise(logits[index], prompt, output, *self.numbers[slot].T[:, :, None])
        return logits


def count_tokens(step: StepView, index: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Occurrences in prompt and in output (with the drafts before it) for some logits rows [n] → two [n, V] int32."""
    slot, row = step.slot[index], step.row[index]
    tokens = step.history[slot, : step.max_len].long()
    place = torch.arange(tokens.shape[1], device=tokens.device)
    in_prompt, known = place < step.num_prompt[slot, None], place < step.known[slot, None]
    before = step.ancestors[index].long()
    drafts = torch.where(before >= 0, step.drafts[row].gather(1, before.clamp(min=0)), vocab_size)
    drafts = torch.where(drafts >= 0, drafts, vocab_size)
    prompt = torch.where(in_prompt & known, tokens, vocab_size)
    output = torch.cat([torch.where(known & ~in_prompt, tokens, vocab_size), drafts], 1)
    return _count(prompt, vocab_size), _count(output, vocab_size)


def _count(tokens: Tensor, vocab_size: int) -> Tensor:
    counts = torch.zeros(len(tokens), vocab_size + 1, dtype=torch.int32, device=tokens.device)
    return counts.scatter_add_(1, tokens, torch.ones_like(tokens, dtype=torch.int32))[:, :vocab_size]


def penalise(logits: Tensor, prompt: Tensor, output: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor) -> Tensor:
    """logits [n, V], counts [n, V], numbers [n, 1]."""
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where((prompt > 0) | (output > 0), repeated, logits)
    return logits - frequency * output - presence * (output > 0)
