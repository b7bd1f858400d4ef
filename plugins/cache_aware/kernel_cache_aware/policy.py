"""The policy. Nobody waits for ever: the key of a request is its arrival number less a bonus between 0 and the window, so it is
served before at most as many earlier arrivals as the window says, and at most as many later ones are served before it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from kernel_core.api import RequestView


class CacheAwarePolicy:
    """Implements `kernel_core.api.Policy`. `window`: the largest bonus, in arrivals, of a request whose prompt is cached as a
    whole; others get their share of it. `refresh`: how many waiting requests are looked up again in each step, in turn."""

    reads_hits = True

    def __init__(self, window: int, refresh: int) -> None:
        self.window, self.refreshed = window, refresh
        self._waiting: dict[str, None] = {}  # longest not looked up first

    def key(self, request: RequestView) -> tuple[Any, ...]:
        self._waiting.pop(request.id, None)
        self._waiting[request.id] = None
        return (request.arrival - self.window * request.expected_hit // max(request.known, 1),)

    def refresh(self) -> Sequence[str]:
        """The next ones in turn. The kernel asks for the keys of those that still wait, which puts them at the end; the others
        are forgotten here."""
        turn = list(islice(self._waiting, self.refreshed))
        for request_id in turn:
            del self._waiting[request_id]
        return turn

    def chunk(self, request: RequestView, remaining: int, budget: int) -> int:
        return min(remaining, budget)

    def victim(self, running: Sequence[RequestView]) -> str:
        return max(running, key=lambda request: request.arrival).id
