"""Sampling over the whole vocabulary: the runner part "sampler", with a few passes over a row in the kernels instead of dozens
of torch ops over all rows. The kernels find the tokens that can win; the definition's own arithmetic decides between them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_core.nn.api import Sampler, StepView, draw_among
from kernel_core.nn.api import mask_bits as plain_mask_bits
from kernel_cpu import build, pointwise

ROOM = 16  # tokens of a row that may be as good as tied


class HostSampler(Sampler):
    """Gives the tokens of `Sampler`."""

    def _argmax(self, logits: Tensor) -> Tensor:
        return pointwise.argmax(logits)

    def _draw(self, logits: Tensor, draws: Tensor, view: StepView, host_slot: np.ndarray) -> None:
        kernels, random = build.library(), np.flatnonzero(self.slots.host["temperature"][host_slot] > 0)
        if kernels is None:
            super()._draw(logits, draws, view, host_slot)
        elif len(random):
            tied = self._draw_rows(kernels, logits, draws, view, host_slot, random)
            if tied.any():
                others = np.where(np.isin(np.arange(len(host_slot)), random[tied]), host_slot, self.slots.padding)
                super()._draw(logits, draws, view, others)

    def _draw_rows(
        self, kernels: Any, logits: Tensor, draws: Tensor, view: StepView, host_slot: np.ndarray, rows: np.ndarray
    ) -> np.ndarray:
        """Enter the draws of these logits rows → of which so many tokens are equal that nothing was decided. A row of which no
        token can be drawn keeps its argmax."""
        host, slot, index = self.slots.host, host_slot[rows], torch.from_numpy(rows)
        numbers = [torch.from_numpy(host[name][slot]) for name in ("temperature", "min_p", "top_k", "top_p")]
        numbers[1] = numbers[1].log()
        key, position = self.slots.key[view.slot[index]], view.position[index].to(torch.int64)
        tokens, values = torch.empty(len(rows), ROOM, dtype=torch.int64), torch.empty(len(rows), ROOM)
        counts, (vocab_size, stride) = np.empty(len(rows), np.int64), (logits.shape[1], logits.stride(0))
        pointers = (x.data_ptr() for x in (index, *numbers, key, position, tokens, values))
        is_bf16 = logits.dtype == torch.bfloat16
        kernels.kc_sample(is_bf16, logits.data_ptr(), stride, *pointers, counts.ctypes.data, ROOM, len(rows), vocab_size)
        decided = (counts > 0) & (counts <= ROOM)
        if decided.any():
            some, most = torch.from_numpy(np.flatnonzero(decided)), int(counts[decided].max())
            drawn = draw_among(values[some, :most], tokens[some, :most], key[some], position[some])
            draws[index[some]] = drawn
        return counts > ROOM

    def rank(self, logits: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        kernels = build.library()
        if kernels is None:
            return super().rank(logits, chosen, k)
        return rank_tokens(kernels, logits.contiguous(), chosen.contiguous(), k, self.mode.endswith("logits"))


def rank_tokens(kernels: Any, logits: Tensor, chosen: Tensor, k: int, as_they_are: bool) -> tuple[Tensor, Tensor, Tensor]:
    """logits [n, V] fp32, chosen [n] → token ids and logprobs, or logits `as_they_are`, [n, 1 + k], chosen first, then the best;
    and the rank of the chosen one [n]."""
    k, (rows, vocab_size) = min(k, logits.shape[1]), logits.shape
    tokens, values = torch.empty(rows, k, dtype=torch.int64), torch.empty(rows, k)
    larger, log_sum = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    pointers = (x.data_ptr() for x in (logits, chosen, tokens, values, larger, log_sum))
    kernels.kc_rank(*pointers, k, rows, vocab_size)
    tokens, values = torch.cat([chosen[:, None], tokens], 1), torch.cat([logits.gather(1, chosen[:, None]), values], 1)
    return tokens, values if as_they_are else values - log_sum[:, None], larger + 1


def mask_bits(logits: Tensor, index: Tensor, words: Tensor) -> Tensor:
    """−inf into the rows `index` [n] int64 of logits [N, V] fp32, in place, where words [n, ceil(V / 32)] int32 have no bit."""
    kernels = build.library()
    if kernels is None:
        return plain_mask_bits(logits, index, words)
    words, rows = words.contiguous(), index.contiguous()
    kernels.kc_mask(logits.data_ptr(), logits.stride(0), rows.data_ptr(), words.data_ptr(), len(rows), logits.shape[1])
    return logits


@contextmanager
def one_thread() -> Iterator[None]:
    """Ops of torch run on the calling thread alone: the part "small_ops". A second one would have to be woken for each, and would
    then spin where the threads of the next model's kernels want to work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
