"""Whole decode steps as CUDA graphs: from the slots' state through the model and the draw back into the slots.

A step is steady when every row computes one token and gains one, and nothing of its requests needs more than the model and a
draw. Such a step depends on the device's own state and on which slots take part; a graph per number of rows replays it, and the
host does one launch and one small copy. The slots are uploaded when they changed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_core.api import StepPlan
from kernel_core.nn.api import AttentionBatch, Forward
from kernel_cuda.capture import LENGTHS, Attempts, Record, fill, sizes_up_to
from kernel_cuda.kernels import sampling, steps
from kernel_cuda.sampling import Draws, draws_of


class SteadySteps:
    """The runner part "steady"."""

    def __init__(self, runner: Any, most_rows: int, record: Record) -> None:
        self.runner, self.slots, self.device = runner, runner.slots, runner.device
        self._record = record
        self.sizes = sizes_up_to(min(most_rows, self.slots.padding))
        self.lengths = [*(n for n in LENGTHS if n < self.slots.max_len), self.slots.max_len + 1]
        self._graphs: dict[tuple[int, int, Draws], Graph] = {}
        self._attempts = Attempts("decode steps")
        self._attempts.usable = not runner.step_inputs and bool(runner.kv.groups)

    def __call__(self, plan: StepPlan) -> Report | None:
        """Run the step; None: it is not such a step. Rate: step, host."""
        if not self._attempts.usable or len(plan.rows) > self.sizes[-1] or not self.runner.is_steady(plan):
            return None
        size = next(size for size in self.sizes if size >= len(plan.rows))
        longest = int(np.max(plan.start)) + 1
        length = next(length for length in self.lengths if length >= longest)
        key = (size, length, draws_of(self.slots, plan.rows))
        graph = self._graphs.get(key) or self._made(*key)
        return graph.replay(plan.rows) if graph is not None else None

    def _made(self, size: int, length: int, draws: Draws) -> Graph | None:
        """The first graph is one of the most rows: what it takes of the pool, those of fewer rows can share. Where it does not
        fit, fewer rows may."""
        attempts = self._attempts
        if not self._graphs and not attempts.full:
            self._capture(self.sizes[-1], length, draws)
            attempts.full = attempts.full and size == self.sizes[-1]
        return self._graphs.get((size, length, draws)) or self._capture(size, length, draws)

    def _capture(self, size: int, length: int, draws: Draws) -> Graph | None:
        step = partial(self._step, length=length, draws=draws)
        make = partial(Graph, step, size, self.slots.padding, self.device, self._record)
        graph = self._attempts(make, f"{size} {draws} rows up to {length} tokens")
        if graph is not None:
            self._graphs[size, length, draws] = graph
        return graph

    def _step(self, rows: Tensor, q_start: Tensor, length: int, draws: Draws) -> Tensor:
        """The step on the device: rows int64 [R] → report int32 [7, R]. Captured."""
        runner, slots = self.runner, self.slots
        batches, ids, positions = [], rows, rows
        for table, group in zip(runner.tables.tables, runner.kv.groups, strict=True):
            most = min(length, table.shape[1] * group.block_size)
            ids, positions, lens, kv_slots, own = steps.begin(
                rows, slots.tokens, slots.computed, table, slots.padding, most, group.block_size
            )
            batches.append(AttentionBatch(q_start, lens, own, kv_slots, group.block_size, 1, most))
        plans = runner.kv.plans(batches, runner.layers)
        hidden = runner.model(Forward(ids, positions, runner.kv.kv, plans, tapped=False))
        logits, drawn = runner.model.logits(hidden), None
        if draws != "greedy":
            numbers = (slots.temperature, slots.min_p, slots.top_k, slots.top_p, slots.key)
            drawn, _ = sampling.sample(logits, rows, positions + 1, *numbers, filters=draws == "filtered")
        return steps.end(rows, logits, drawn, slots.tokens, slots.known, slots.computed, slots.padding, slots.max_len)


class Graph:
    """A captured step of `size` rows. Rows beyond those of a plan name the slot `padding`, which no step changes."""

    def __init__(
        self, step: Callable[[Tensor, Tensor], Tensor], size: int, padding: int, device: torch.device, record: Record
    ) -> None:
        self.size, self.padding = size, padding
        self.rows = torch.full((size,), padding, dtype=torch.int64, device=device)
        self._q_start = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._shown: np.ndarray | None = None
        self._replay, self._report = record(lambda: step(self.rows, self._q_start))

    def replay(self, slots: np.ndarray) -> Report:
        """Run the step for these slots (host, at most `size`). Rate: step."""
        if self._shown is None or not np.array_equal(self._shown, slots):
            padded = np.full(self.size, self.padding, np.int64)
            padded[: len(slots)] = slots
            fill(self.rows, padded)
            self._shown = np.array(slots)
        self._replay()
        return Report(self._report, len(slots))


class Report:
    """A step's report on its way to the host."""

    def __init__(self, report: Tensor, rows: int) -> None:
        self._rows = rows
        self._host = torch.empty(report.shape, dtype=report.dtype, pin_memory=report.is_cuda)
        self._host.copy_(report, non_blocking=True)
        self._arrived = torch.cuda.Event() if report.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def arrays(self) -> dict[str, np.ndarray]:
        """Wait for it: "tokens" [R, 1], "numbers" [5, R], "bad" bool [R]."""
        if self._arrived is not None:
            self._arrived.synchronize()
        report = self._host.numpy()[:, : self._rows]
        return {"tokens": report[0][:, None], "numbers": report[1:6], "bad": report[6] != 0}
