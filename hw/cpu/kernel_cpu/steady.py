"""The runner part "steady": a decode step from the slots' state through the model and the draw back into the slots, with numpy
on the host's own memory instead of some forty small torch ops, which take longer than a small model.

A step is steady when every row computes one token and gains one, and nothing of its requests needs more than the model and a
draw."""

from __future__ import annotations

from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_core.api import StepPlan
from kernel_core.nn.api import AttentionBatch, Forward
from kernel_cpu.sampling import one_thread
from kernel_cpu.steps import SlotArrays, cache_slots


class Finished:
    """A step that is over. `tokens` [R] int64, `bad` [R] bool, `computed` [R] counts after it."""

    def __init__(self, tokens: np.ndarray, bad: np.ndarray, computed: np.ndarray, timings: dict[str, float]) -> None:
        self.timings = timings
        nothing = np.zeros(len(tokens), np.int32)
        numbers = np.stack([(~bad).astype(np.int32), nothing, nothing, computed, nothing])
        self._arrays = {"tokens": tokens.astype(np.int32)[:, None], "numbers": numbers, "bad": bad}

    def arrays(self) -> dict[str, np.ndarray]:
        """As `transfer.Download` gives them."""
        return self._arrays


class SteadySteps:
    """Callable StepPlan → `Finished`, or None: it is not such a step."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._host, self._last = SlotArrays(runner.slots), runner.slots.max_len
        self._groups = [(group, table.numpy()) for group, table in zip(runner.kv.groups, runner.tables.tables, strict=True)]
        self._usable = bool(self._groups) and not runner.step_inputs

    def __call__(self, plan: StepPlan) -> Finished | None:
        """Rate: step."""
        if not self._usable or not self._runner.is_steady(plan):
            return None
        rows = np.asarray(plan.rows, np.int64)
        began = perf_counter()
        forward = self._forward(rows, self._host.computed[rows].astype(np.int64))
        filled = perf_counter()
        hidden = self._runner.graphs(forward)
        computed = perf_counter()
        logits = self._runner.model.logits(hidden)
        with one_thread():
            tokens, bad = self._sample(rows, logits)
        self._enter(rows, tokens)
        timings = {"inputs": filled - began, "forward": computed - filled, "sample": perf_counter() - computed}
        return Finished(tokens, bad, self._host.computed[rows], timings)

    def _forward(self, rows: np.ndarray, place: np.ndarray) -> Forward:
        """The rows' newest tokens, which stand at `place` [R]."""
        ids = torch.from_numpy(self._host.tokens[rows, place].astype(np.int64))
        lengths, q_start = torch.from_numpy((place + 1).astype(np.int32)), torch.arange(len(rows) + 1, dtype=torch.int32)
        longest, batches = int(place.max()) + 1, []
        for group, table in self._groups:
            size = group.block_size
            own = table[rows, : -(-longest // size)]
            slots = cache_slots(own, np.arange(len(rows)), place, size)
            batches.append(AttentionBatch(q_start, lengths, torch.from_numpy(own), torch.from_numpy(slots), size, 1, longest))
        kv = self._runner.kv
        return Forward(ids, torch.from_numpy(place), kv.kv, kv.plans(batches, self._runner.layers), tapped=False)

    def _sample(self, rows: np.ndarray, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [R] int64, and whether they are bad."""
        slot, position = torch.from_numpy(rows), torch.from_numpy(self._host.known[rows].astype(np.int64))
        view = SimpleNamespace(slot=slot, position=position)
        sampled = self._runner.sampler(logits, view, SimpleNamespace(logits_slot=rows, logits_row=np.arange(len(rows))), None)
        return sampled.draws.numpy(), sampled.bad.numpy()

    def _enter(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        self._host.tokens[rows, np.minimum(self._host.known[rows], self._last)] = tokens
        self._host.known[rows] += 1
        self._host.computed[rows] += 1
