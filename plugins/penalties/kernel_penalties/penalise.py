"""The op `penalise`, and its reference: the formula, and what occurred."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_core.nn.api import StepView

COUNTS_AT_ONCE = 1 << 22  # counters, in all


class Penalise:
    """`penalise(logits [N, V] float32, index [n] int64, step, numbers [S, 3]) → logits`, in place; facts: vocab_size.

    `index` are the logits rows that are penalised, each once, `numbers` by slot the presence, frequency and repetition penalty:
    repetition of what occurred in prompt or output, then frequency, then presence of what occurred in the output, the drafts
    before the row included. Only the logits of those tokens are touched, not the whole vocabulary. Rate: step."""

    def __init__(self) -> None:
        self._counts = torch.zeros(0, 0)  # all zero between two uses

    def __call__(self, logits: Tensor, index: Tensor, step: StepView, numbers: Tensor) -> Tensor:
        for some in index.split(max(1, COUNTS_AT_ONCE // logits.shape[1])):
            tokens, output = occurred(step, some)
            places = some[:, None], tokens
            mine = numbers[step.slot[some]].T[:, :, None]
            logits[places] = penalised(logits[places], self._times(tokens, output, logits.shape[1]), *mine)
        return logits

    def _times(self, tokens: Tensor, counted: Tensor, vocab_size: int) -> Tensor:
        """How often each of the tokens [n, P] is among the counted ones of its row [n, P] bool → [n, P] int32."""
        if len(tokens) > len(self._counts):
            self._counts = torch.zeros(len(tokens), vocab_size, dtype=torch.int32, device=tokens.device)
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


def penalised(logits: Tensor, times: Tensor, presence: Tensor, frequency: Tensor, repetition: Tensor) -> Tensor:
    """Logits [n, P] of tokens that occurred, how often in the output [n, P], numbers [n, 1]."""
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    return repeated - frequency * times - presence * (times > 0)
