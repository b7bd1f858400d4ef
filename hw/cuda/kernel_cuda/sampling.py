"""Sampling over the whole vocabulary without sorting it: the runner part "sampler"."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from torch import Tensor

from kernel_core.nn.api import Sampler, SlotTable, StepView
from kernel_cuda.kernels import sampling as kernels

Draws = Literal["greedy", "random", "filtered"]


def draws_of(state: SlotTable, slots: np.ndarray) -> Draws:
    """The most that any of these slots asks of sampling. Host."""
    random = state.host["temperature"][slots] > 0
    if not random.any():
        return "greedy"
    return "filtered" if (state.filters(slots) & random).any() else "random"


class FusedSampler(Sampler):
    """Gives the tokens of `Sampler` in two launches, six where a row filters. `ranks`: logprobs, also processed ones, by kernels
    too."""

    def __init__(self, *parts: Any, ranks: bool = False) -> None:
        super().__init__(*parts)
        self._ranks = ranks

    def draw_rows(self, logits: Tensor, view: StepView, host_slot: np.ndarray) -> tuple[Tensor, Tensor]:
        draws, slots = draws_of(self.slots, host_slot), self.slots
        if draws == "greedy":
            return kernels.argmax(logits)
        numbers = slots.temperature, slots.min_p, slots.top_k, slots.top_p, slots.key
        return kernels.sample(logits, view.slot, view.position, *numbers, filters=draws == "filtered")

    def filtered(self, logits: Tensor, slot: Tensor, host_slot: np.ndarray) -> Tensor:
        if not self._ranks:
            return super().filtered(logits, slot, host_slot)
        slots, filters = self.slots, bool(self.slots.filters(host_slot).any())
        return kernels.filtered(logits, slot, slots.temperature, slots.min_p, slots.top_k, slots.top_p, filters)

    def rank(self, logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        if not self._ranks:
            return super().rank(logits, chosen, k)
        return kernels.rank(logits, chosen, k, self.mode.endswith("logits"))
