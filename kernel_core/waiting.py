"""Requests that wait: gates that must open, the policy's heap, and those that a resource refused."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import numpy as np

from kernel_core.policy import FirstComeFirstServed
from kernel_core.protocols import Policy, PrefixRequest, RequestView
from kernel_core.request import LENGTH, RUNNING, STOP, Request


class State(Enum):
    GATED = auto()  # a gate is closed, or the first request of its family computes the prompt
    WAITING = auto()
    RUNNING = auto()  # owns a slot
    DRAINING = auto()  # preempted, plans in flight still bring it tokens
    ENDED = auto()


@dataclass(slots=True, eq=False)
class Entry:
    """A request inside the scheduler. `tokens` is what is known of it whenever it owns no slot."""

    request: Request
    arrival: int
    tokens: np.ndarray
    closed_gates: set[str]
    state: State = State.GATED
    key: tuple[Any, ...] = ()
    slot: int = -1
    ticket: int = 0  # of its valid item in the heap
    refused_at: int | None = None  # how many requests had been admitted when a resource first refused it
    inflight: int = 0  # plans in flight that still bring it tokens while it is draining
    cached: int | None = None  # hit tokens when it was first scheduled
    reported: int = 0
    prefix: PrefixRequest | None = None  # as the prefix index sees it, while `tokens` is what is known of it
    fetched: bool = False  # what a connector stores of it was fetched since it last had a slot
    awaited: int = 0  # tokens of its prompt that it waited for another request to compute

    @property
    def num_prompt(self) -> int:
        return self.request.token_ids.size

    def accept(self, tokens: np.ndarray) -> tuple[int, int, int]:
        """Append new tokens up to the first that ends the request: (how many, finish code, stop token or -1)."""
        tokens = tokens[: self.request.max_len - self.tokens.size]
        for i, token in enumerate(tokens.tolist()):
            if token in self.request.stop_ids:
                self.tokens = np.concatenate([self.tokens, tokens[: i + 1]])
                return i + 1, STOP, token
        self.tokens = np.concatenate([self.tokens, tokens])
        return tokens.size, LENGTH if self.tokens.size >= self.request.max_len else RUNNING, -1


class WaitingQueue:
    """The policy's heap. A request that a resource refused is set aside, and tried again after a release of resources; when
    `passes` others were admitted since its first refusal it is first in line, and nobody is admitted before it."""

    def __init__(self, policy: Policy, passes: int, view: Callable[[Entry], RequestView]) -> None:
        self.policy, self.passes, self.view = policy, passes, view
        self.arrivals_only = type(policy) is FirstComeFirstServed
        self.admitted = 0
        self._heap: list[tuple[tuple[Any, ...], int, int, Entry]] = []
        self._refused: dict[Entry, None] = {}  # in order of first refusal, the ones set aside and the ones tried again
        self._aside: list[Entry] = []
        self._count = self._tickets = 0

    def __len__(self) -> int:
        return self._count

    def push(self, entry: Entry) -> None:
        """On arrival and on preemption: the policy is asked for the key."""
        entry.state = State.WAITING
        self._count += 1
        self._insert(entry, self._key(entry))

    def _insert(self, entry: Entry, key: tuple[Any, ...]) -> None:
        self._tickets += 1
        entry.key, entry.ticket = (key, entry.arrival), self._tickets
        heapq.heappush(self._heap, (*entry.key, entry.ticket, entry))

    def rekey(self, entry: Entry) -> None:
        """The policy says that the key changed."""
        if entry.state is State.WAITING:
            self._insert(entry, self._key(entry))

    def _key(self, entry: Entry) -> tuple[Any, ...]:
        return () if self.arrivals_only else self.policy.key(self.view(entry))

    def overdue(self) -> Entry | None:
        """The request that nobody may be admitted before, if any."""
        first = next(iter(self._refused), None)
        return first if first is not None and self.admitted - (first.refused_at or 0) >= self.passes else None

    def first(self) -> Entry | None:
        """Whose turn it is; stays in the queue."""
        overdue = self.overdue()
        if overdue is not None:
            return overdue
        while self._heap and self._heap[0][3].ticket != self._heap[0][2]:
            heapq.heappop(self._heap)
        return self._heap[0][3] if self._heap else None

    def refuse(self, entry: Entry) -> None:
        """A resource said no: set it aside, so that those behind it get their turn."""
        if entry.refused_at is None:
            entry.refused_at = self.admitted
        self._refused[entry] = None
        if entry.ticket:
            self._aside.append(entry)
            entry.ticket = 0

    def retry(self) -> None:
        """Resources were released: those set aside take their places in the heap again."""
        aside, self._aside = self._aside, []
        for entry in aside:
            if entry in self._refused and entry.ticket == 0:
                self._insert(entry, entry.key[0])

    def gate(self, entry: Entry) -> None:
        """It waits for something else than its turn."""
        self.remove(entry)
        entry.state = State.GATED

    def admit(self, entry: Entry) -> None:
        self.remove(entry)
        self.admitted += 1

    def remove(self, entry: Entry) -> None:
        """It was admitted or ended."""
        self._count -= 1
        self._refused.pop(entry, None)
        entry.ticket, entry.refused_at = -1, None
