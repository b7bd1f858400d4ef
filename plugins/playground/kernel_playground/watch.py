"""The engine part: what the page draws, kept for the last minutes. Token ids and texts are not kept."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernel_core.api import Arrival, EngineContext, Opened, StepPlan, StepRecord

STEPS = 400  # kept for the timeline
SECONDS = 90  # kept for the rates
CELLS = 1024  # squares of the grid of blocks
LISTED = 100  # running and waiting sequences that are told one by one
FREE, KEPT, USED, SHARED = range(4)  # what a block is; KEPT: nobody uses it now, its content may be found again


@dataclass(slots=True)
class Seen:
    """A sequence from its arrival to its end."""

    arrival: Arrival
    slot: int = -1
    cached: int = 0
    preempted: int = 0


class Watch:
    """Implements `Observer`."""

    def __init__(self, context: EngineContext) -> None:
        self._began = time.monotonic()
        self._limits = {"slots": context.max_slots, "tokens": context.max_tokens_per_step, "length": context.max_model_len}
        self._block_size = context.groups[0].block_size if context.groups else 0
        self._num_blocks = context.num_blocks[0] if context.num_blocks else 1
        self._references = np.zeros(self._num_blocks, np.int32)  # of the first KV group
        self._touched = np.zeros(self._num_blocks, bool)
        self._tables: dict[int, list[np.ndarray]] = {}
        self._seen: dict[str, Seen] = {}
        self._generated = np.zeros(context.max_slots, np.int64)
        self._computed = np.zeros(context.max_slots, np.int64)
        self._steps: deque[tuple[float, ...]] = deque(maxlen=STEPS)
        self._rates: deque[list[int]] = deque(maxlen=SECONDS)
        self._count = self._ended = 0
        self._free = self._num_blocks - 1

    # ---- what the loop tells

    def added(self, arrival: Arrival) -> None:
        self._seen[arrival.id] = Seen(arrival)

    def step(self, record: StepRecord) -> None:
        plan = record.plan
        for slot in plan.closed:
            self._release(int(slot))
        for opened in plan.opened:
            self._open(opened)
        self._take(plan)
        self._free = record.free_blocks[0] if record.free_blocks else 0
        if len(plan.rows):
            self._record(record)

    def finished(self, request_id: str, reason: str, num_prompt: int, num_output: int) -> None:
        seen = self._seen.pop(request_id)
        self._ended += 1
        if seen.slot >= 0:
            self._release(seen.slot)

    # ---- one step

    def _open(self, opened: Opened) -> None:
        slot, seen = opened.slot, self._seen.get(opened.request_id)
        if seen is None:
            return
        if seen.slot >= 0:
            seen.preempted += 1
        seen.slot, seen.cached = slot, opened.computed
        self._tables[slot] = []
        self._generated[slot] = len(opened.token_ids) - seen.arrival.num_prompt
        self._computed[slot] = opened.computed

    def _take(self, plan: StepPlan) -> None:
        if not plan.new_blocks or not len(plan.new_blocks[0].ids):
            return
        update = plan.new_blocks[0]
        for slot in np.unique(update.slots):
            table = self._tables.get(int(slot))
            if table is not None:
                ids = update.ids[update.slots == slot]
                table.append(ids)
                np.add.at(self._references, ids, 1)
                self._touched[ids] = True

    def _release(self, slot: int) -> None:
        for ids in self._tables.pop(slot, ()):
            np.subtract.at(self._references, ids, 1)

    def _record(self, record: StepRecord) -> None:
        plan, result = record.plan, record.result
        gained = np.diff(result.offsets)
        prompt = int(plan.q[plan.q > plan.room].sum())
        new = int(gained.sum())
        self._generated[plan.rows] += gained
        self._computed[plan.rows] = result.computed
        self._count += 1
        begun, ended = record.planned_at - self._began, record.committed_at - self._began
        row = (self._count, round(begun, 5), round(ended, 5), len(plan.rows), prompt, new, record.running, record.waiting)
        self._steps.append(row)
        second = int(ended)
        if not self._rates or self._rates[-1][0] != second:
            self._rates.append([second, 0, 0])
        self._rates[-1][1] += prompt
        self._rates[-1][2] += new

    # ---- what the page gets

    def view(self, data: bytes) -> bytes:
        """The number of the last step that is known (ASCII) → JSON."""
        known = int(data or b"0")
        running = [seen for seen in self._seen.values() if seen.slot in self._tables]
        waiting = [seen for seen in self._seen.values() if seen.slot not in self._tables]
        now = time.monotonic()
        return json.dumps(
            {
                "now": round(now - self._began, 3),
                "limits": self._limits,
                "steps": [step for step in self._steps if step[0] > known],
                "count": self._count,
                "ended": self._ended,
                "rates": list(self._rates),
                "running": [self._told(seen, now) for seen in running[:LISTED]],
                "waiting": [self._told(seen, now) for seen in waiting[:LISTED]],
                "num_running": len(running),
                "num_waiting": len(waiting),
                "blocks": self._blocks(bool(running)),
            }
        ).encode()

    def _told(self, seen: Seen, now: float) -> dict[str, Any]:
        slot = seen.slot
        known = seen.slot in self._tables
        return {
            "id": seen.arrival.id,
            "prompt": seen.arrival.num_prompt,
            "limit": seen.arrival.max_tokens,
            "generated": int(self._generated[slot]) if known else 0,
            "computed": int(self._computed[slot]) if known else 0,
            "cached": seen.cached,
            "preempted": seen.preempted,
            "age": round(now - seen.arrival.at, 2),
        }

    def _blocks(self, busy: bool) -> dict[str, Any]:
        """The first KV group in at most `CELLS` squares, each as its busiest block. Block 0 is nobody's."""
        references, touched = self._references[1:], self._touched[1:]
        state = np.where(references > 1, SHARED, np.where(references > 0, USED, np.where(touched, KEPT, FREE)))
        each = -(-len(state) // CELLS) or 1
        cells = -(-len(state) // each)
        state = np.pad(state, (0, cells * each - len(state))).reshape(cells, each).max(axis=1) if cells else state
        return {
            "total": self._num_blocks - 1,
            "free": self._free if busy else self._num_blocks - 1,
            "size": self._block_size,
            "each": each,
            "cells": "".join(map(str, state.tolist())),
        }
