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

from kernel_core.nn.draws import draw, draw_kept
from kernel_core.nn.inputs import Layout
from kernel_core.nn.logprobs import LogprobColumns, rank_tokens
from kernel_core.nn.protocols import StepView
from kernel_core.nn.slots import SlotTable
from kernel_core.nn.transfer import upload

ELEMENTS_AT_ONCE = {True: 1 << 19, False: 1 << 26}  # logits that draws work on at a time: on a host device, a cache's worth
LOOKS = (256, 4096)  # how many of the best tokens top_p looks at before it sorts all, where a host read is free
WEIGHT_ONE = 2.0**30  # the likeliest token's weight

Transform = Callable[[Tensor, StepView], Tensor]


@dataclass(slots=True)
class Sampled:
    """`draws` [N] int64 what each logits row drew, `bad` [N] bool it had NaN or no allowed token, `logprobs` of the rows
    that asked (`where`: the logits row)."""

    draws: Tensor
    bad: Tensor
    logprobs: LogprobColumns | None = None


class Sampler:
    """The runner part "sampler". Replaceable: anything called like this, `(logits, view, layout, transform) → Sampled`.

    A device may replace `draw_rows`, `filtered` and `rank`, which are all passes over the whole vocabulary."""

    def __init__(self, slots: SlotTable, vocab_size: int, logprobs_mode: str) -> None:
        self.slots, self.vocab_size, self.mode = slots, vocab_size, logprobs_mode
        self._reads_are_free = slots.device.type == "cpu"

    def __call__(self, logits: Tensor, view: StepView, layout: Layout, transform: Transform | None) -> Sampled:
        """logits [N, V] in the model's dtype, may be overwritten. Rate: step."""
        asked = np.flatnonzero(self.slots.host["logprobs"][layout.logits_slot] >= 0)
        raw = self._rows(logits, asked) if len(asked) and self.mode.startswith("raw") else None
        if transform is not None:
            logits = transform(logits.float(), view)
        draws, bad = self.draw_rows(logits, view, layout.logits_slot)
        return Sampled(draws, bad, self._logprobs(asked, raw, logits, draws, view, layout))

    def draw_rows(self, logits: Tensor, view: StepView, host_slot: np.ndarray) -> tuple[Tensor, Tensor]:
        """`draws` and `bad` of `Sampled` for logits [N, V], which stay as they are; `host_slot` [N]: their slots. Rate: step."""
        draws = self._argmax(logits)
        best = logits.gather(1, draws[:, None]).squeeze(1)
        self._draw(logits, draws, view, host_slot)
        return draws, best.isnan() | best.isneginf()

    def _argmax(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1)

    def _draw(self, logits: Tensor, draws: Tensor, view: StepView, host_slot: np.ndarray) -> None:
        """Enter the draws of the rows that are not greedy; those with filters first, as few of their tokens need noise."""
        random = self.slots.host["temperature"][host_slot] > 0
        filtered = self.slots.filters(host_slot)
        for rows, few in ((random & filtered, self._reads_are_free), (random & ~filtered, False)):
            for part in self._parts(np.flatnonzero(rows)):
                index = upload(part, logits.device)
                slot = view.slot[index]
                kept = self.filtered(logits[index].float(), slot, host_slot[part])
                draws[index] = (draw_kept if few else draw)(kept, self.slots.key[slot], view.position[index])

    def _rows(self, logits: Tensor, rows: np.ndarray) -> Tensor:
        """A copy of some rows in float32."""
        return logits[upload(rows, logits.device)].float()

    def _parts(self, rows: np.ndarray) -> list[np.ndarray]:
        size = max(1, ELEMENTS_AT_ONCE[self._reads_are_free] // self.vocab_size)
        return [rows[at : at + size] for at in range(0, len(rows), size)]

    def filtered(self, logits: Tensor, slot: Tensor, host_slot: np.ndarray) -> Tensor:
        """Temperature (greedy rows: 1) and filters: logits [n, V] float32, slot [n] and on the host → [n, V], −inf dropped."""
        temperature = self.slots.temperature[slot][:, None]
        logits = logits / torch.where(temperature > 0, temperature, 1.0)
        use = np.flatnonzero(self.slots.filters(host_slot))
        if not len(use):
            return logits
        index = upload(use, logits.device)
        part, slot = logits[index], slot[index]
        numbers = (self.slots.min_p[slot], self.slots.top_k[slot], self.slots.top_p[slot])
        for width in self._widths(host_slot):
            floor, enough = lowest_kept(part, *numbers, width)
            if width == self.vocab_size or not self._reads_are_free or enough.all():
                break
        logits[index] = part.masked_fill(part < floor, float("-inf"))
        return logits

    def _widths(self, host_slot: np.ndarray) -> tuple[int, ...]:
        """How many of the best tokens the filters must see in order; the next one is tried where one was not enough."""
        top_k, top_p = self.slots.host["top_k"][host_slot], self.slots.host["top_p"][host_slot]
        needed = min(int(top_k.max()), self.vocab_size)
        if not ((top_p < 1) & (top_k <= 0)).any():
            return (needed,)
        looks = LOOKS if self._reads_are_free else ()
        return (*(width for width in looks if needed <= width < self.vocab_size), self.vocab_size)

    def _logprobs(
        self, asked: np.ndarray, raw: Tensor | None, logits: Tensor, draws: Tensor, view: StepView, layout: Layout
    ) -> LogprobColumns | None:
        if not len(asked):
            return None
        index = upload(asked, logits.device)
        slot = layout.logits_slot[asked]
        values = self.filtered(logits[index].float(), view.slot[index], slot) if raw is None else raw
        k = self.slots.host["logprobs"][slot]
        return LogprobColumns(layout.logits_row[asked], asked, k, *self.rank(values, draws[index], int(k.max())))

    def rank(self, logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """logits [n, V] float32, chosen [n] → what `rank_tokens` gives of their logprobs, or of themselves, as the mode says.
        Replaceable; also what ranks prompt tokens. Rate: step."""
        return rank_tokens(logits if self.mode.endswith("logits") else logits.log_softmax(-1), chosen, k)


def lowest_kept(logits: Tensor, min_p: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The smallest logit that min_p, then top_k, then top_p keep, per row: [n, V] float32 → [n, 1], and whether looking at
    the best `width` tokens in order (at least every top_k; 0: none) was enough to say so. Off: 0, 0 and 1."""
    best = logits.amax(-1, keepdim=True)
    floor = best + min_p[:, None].log()  # log 0 = −inf: off
    if not width:
        return floor, torch.ones_like(floor, dtype=torch.bool)
    full = width == logits.shape[1]
    order = logits.sort(-1, descending=True).values if full else logits.topk(width, -1).values
    by_rank, top_k, top_p = top_k[:, None] > 0, top_k[:, None].long(), top_p[:, None]
    floor = torch.where(by_rank, torch.maximum(floor, order.gather(1, top_k.clamp(1, width) - 1)), floor)
    inside = (order >= floor) & (~by_rank | (torch.arange(width, device=logits.device) < top_k))
    mass = _weights(order, best, inside).cumsum(-1, dtype=torch.int64)
    total = mass[:, -1:]
    if not full:
        total = torch.where(by_rank, total, _weights(logits, best, logits >= floor).sum(-1, keepdim=True, dtype=torch.int64))
    wanted = top_p.double() * total.double()
    reached = mass.double() >= wanted
    pth = order.gather(1, reached.int().argmax(-1, keepdim=True))
    return torch.where(top_p < 1, torch.maximum(floor, pth), floor), reached[:, -1:] | (top_p >= 1)


def _weights(logits: Tensor, best: Tensor, inside: Tensor) -> Tensor:
    """Integers in proportion to probability: their sums do not depend on the order of summation."""
    return (logits - best).exp_().mul_(WEIGHT_ONE).int().masked_fill_(~inside, 0)
