"""Sampling of all logits rows of a step, whatever their requests ask for.

Order: raw logprobs → transforms (mask, bias, penalty, temperature stages) → greedy, or temperature → min_p → top_k → top_p →
draw. top_k and top_p keep every token that equals the last one they keep, so that equal logits are treated equally. A row's
result depends on its own numbers only, never on the other rows of the batch: sums that decide are sums of integers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernel_core.nn.draws import draw
from kernel_core.nn.inputs import Layout
from kernel_core.nn.logprobs import LogprobColumns, rank_tokens
from kernel_core.nn.protocols import StepView
from kernel_core.nn.slots import SlotTable
from kernel_core.nn.transfer import upload

ELEMENTS_AT_ONCE = 1 << 21  # logits that random draws work on at a time
WEIGHT_ONE = 2.0**44  # the likeliest token's weight; 2^19 tokens of it fit in 63 bits

Transform = Callable[[Tensor, StepView], Tensor]


@dataclass(slots=True)
class Sampled:
    """`draws` [N] int64 what each logits row drew, `bad` [N] bool it had NaN or no allowed token, `logprobs` of the rows
    that asked (`where`: the logits row)."""

    draws: Tensor
    bad: Tensor
    logprobs: LogprobColumns | None = None


class Sampler:
    """The runner part "sampler". Replaceable: anything called like this, `(logits, view, layout, transform) → Sampled`."""

    def __init__(self, slots: SlotTable, vocab_size: int, logprobs_mode: str) -> None:
        self.slots, self.vocab_size, self.mode = slots, vocab_size, logprobs_mode

    def __call__(self, logits: Tensor, view: StepView, layout: Layout, transform: Transform | None) -> Sampled:
        """logits [N, V] in the model's dtype, may be overwritten. Rate: step."""
        asked = np.flatnonzero(self.slots.host["logprobs"][layout.logits_slot] >= 0)
        raw = self._rows(logits, asked).clone() if len(asked) and self.mode.startswith("raw") else None
        if transform is not None:
            logits = transform(logits.float(), view)
        best = logits.max(-1)
        draws = best.indices
        random = np.flatnonzero(self.slots.host["temperature"][layout.logits_slot] > 0)
        for part in self._parts(random):
            index = upload(part, logits.device)
            slot = view.slot[index]
            kept = self._filtered(logits[index].float(), slot, layout.logits_slot[part])
            draws[index] = draw(kept, self.slots.key[slot], view.position[index])
        bad = best.values.isnan() | best.values.isneginf()
        return Sampled(draws, bad, self._logprobs(asked, raw, logits, draws, view, layout))

    def _rows(self, logits: Tensor, rows: np.ndarray) -> Tensor:
        return logits[upload(rows, logits.device)].float()

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        size = max(1, ELEMENTS_AT_ONCE // self.vocab_size)
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def _filtered(self, logits: Tensor, slot: Tensor, host_slot: np.ndarray) -> Tensor:
        """Temperature and filters; greedy rows stay as they are. logits [n, V] float32, slot [n] → [n, V], −inf dropped."""
        temperature = self.slots.temperature[slot][:, None]
        logits = logits / torch.where(temperature > 0, temperature, 1.0)
        host = {name: self.slots.host[name][host_slot] for name in ("min_p", "top_k", "top_p")}
        use = (host["min_p"] > 0) | (host["top_k"] > 0) | (host["top_p"] < 1)
        if not use.any():
            return logits
        index = upload(np.flatnonzero(use), logits.device)
        part, slot = logits[index], slot[index]
        numbers = (self.slots.min_p[slot], self.slots.top_k[slot], self.slots.top_p[slot])
        floor = lowest_kept(part, *numbers, _sort_width(host["top_k"], host["top_p"], self.vocab_size))
        logits[index] = part.masked_fill(part < floor, float("-inf"))
        return logits

    def _logprobs(
        self, asked: np.ndarray, raw: Tensor | None, logits: Tensor, draws: Tensor, view: StepView, layout: Layout
    ) -> LogprobColumns | None:
        if not len(asked):
            return None
        index = upload(asked, logits.device)
        slot = layout.logits_slot[asked]
        values = self._filtered(logits[index].float(), view.slot[index], slot) if raw is None else raw
        values = values if self.mode.endswith("logits") else values.log_softmax(-1)
        k = self.slots.host["logprobs"][slot]
        columns = rank_tokens(values, draws[index], int(k.max()))
        return LogprobColumns(layout.logits_row[asked], asked, k, *columns)


def _sort_width(top_k: np.ndarray, top_p: np.ndarray, vocab_size: int) -> int:
    """How many of the best tokens the filters must see in order: 0 none, V when a row has top_p without top_k."""
    if ((top_p < 1) & (top_k <= 0)).any():
        return vocab_size
    return min(int(top_k.max()), vocab_size)


def lowest_kept(logits: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> Tensor:
    """The smallest logit that min_p, then top_k, then top_p keep, per row: [n, V] float32 → [n, 1]. Off: 0, 0 and 1.
    `width` is `_sort_width` of these rows; a larger one changes nothing."""
    best = logits.amax(-1, keepdim=True)
    floor = best + min_p[:, None].log()  # log 0 = −inf: off
    if not width:
        return floor
    order = logits.sort(-1, descending=True).values if width == logits.shape[1] else logits.topk(width, -1).values
    top_k, top_p = top_k[:, None].long(), top_p[:, None].double()
    kth = order.gather(1, top_k.clamp(1, width) - 1)
    floor = torch.where(top_k > 0, torch.maximum(floor, kth), floor)
    rank = torch.arange(width, device=logits.device)
    inside = (order >= floor) & ((top_k <= 0) | (rank < top_k))
    weight = ((order - best).exp() * WEIGHT_ONE).long().masked_fill_(~inside, 0)
    total = weight.cumsum(-1)
    needed = ((total - weight).double() < top_p * total[:, -1:].double()) & inside
    pth = order.gather(1, (needed.sum(-1, keepdim=True) - 1).clamp_(min=0))
    return torch.where(top_p < 1, torch.maximum(floor, pth), floor)
