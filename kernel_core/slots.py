"""What the scheduler knows of running requests, in arrays `[field, slot]`: a step costs numpy calls, not Python per row."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from kernel_core.waiting import Entry

NEVER = np.iinfo(np.int64).max
FIELDS = ("known", "computed", "known_done", "computed_done", "max_len", "width", "write_from", "flags", "reported")


class Slots:
    """Slots of running requests, lowest first; free ones hold zeros (and `since` NEVER), so nothing has to mask them.

    known, computed: upper bounds, plans in flight included. known_done, computed_done: committed, true. width: drafts a row
    may carry. reported: prompt positions whose logprobs went out. since: the plan that opened the slot. last: the last
    plan naming it. tokens: all committed tokens, int32 [slots, max_model_len]."""

    known: np.ndarray
    computed: np.ndarray
    known_done: np.ndarray
    computed_done: np.ndarray
    max_len: np.ndarray
    width: np.ndarray
    write_from: np.ndarray
    flags: np.ndarray
    reported: np.ndarray

    def __init__(self, max_slots: int, max_model_len: int) -> None:
        self.state = np.zeros((len(FIELDS), max_slots), np.int32)
        for name, row in zip(FIELDS, self.state):
            setattr(self, name, row)
        self.since = np.full(max_slots, NEVER, np.int64)
        self.last = np.zeros(max_slots, np.int64)
        self.tokens = np.zeros((max_slots, max_model_len), np.int32)
        self.entries: list[Entry | None] = [None] * max_slots
        self.last_plan = 0  # id of the last plan made
        self.closures = 0  # how many slots were ever closed: a plan made at the same count has no void rows
        self._flat = self.tokens.reshape(-1)
        self._ids = np.full(max_slots, None, object)
        self._free = list(range(max_slots))
        self._rows: np.ndarray | None = None
        self._row_ids: tuple[str, ...] = ()

    @property
    def available(self) -> int:
        return len(self._free)

    @property
    def rows(self) -> np.ndarray:
        """Running slots, ascending (intp). The same array object until one opens or closes."""
        if self._rows is None:
            self._rows = np.flatnonzero(self.since != NEVER)
            self._row_ids = tuple(self._ids.take(self._rows).tolist())
        return self._rows

    def ids(self, rows: np.ndarray) -> tuple[str, ...]:
        """Request ids of slots. The same tuple object for the same `rows` object."""
        if rows is self._rows:
            return self._row_ids
        return tuple(self._ids.take(rows).tolist())

    def open(self, entry: Entry, computed: int, write_from: int) -> int:
        """In the next plan the lowest free slot takes a request whose first `computed` tokens have their KV already."""
        slot = heapq.heappop(self._free)
        request, count = entry.request, entry.tokens.size
        self.state[:, slot] = (
            *(count, computed, count, computed, request.max_len),
            *(0, write_from, request.flags, entry.reported),
        )
        self.tokens[slot, :count] = entry.tokens
        self.since[slot] = self.last[slot] = self.last_plan + 1
        self.entries[slot], self._ids[slot], entry.slot, self._rows = entry, request.id, slot, None
        return slot

    def close(self, entry: Entry) -> int:
        """The request leaves its slot, which `free` makes available again."""
        slot = entry.slot
        self.state[:, slot] = 0
        self.since[slot] = NEVER
        self.entries[slot] = self._ids[slot] = self._rows = None
        entry.slot = -1
        self.closures += 1
        return slot

    def free(self, slots: list[int]) -> None:
        for slot in slots:
            heapq.heappush(self._free, slot)

    def store(self, rows: np.ndarray, first: np.ndarray, counts: np.ndarray, tokens: np.ndarray) -> None:
        """Append tokens (flat, counts[i] of them for slot rows[i]) at positions first[i], first[i] + 1, ..."""
        start = rows * self.tokens.shape[1] + first
        if tokens.size == rows.size and counts.all():
            self._flat[start] = tokens
        elif tokens.size:
            self._flat[np.repeat(start - counts.cumsum() + counts, counts) + np.arange(tokens.size)] = tokens
