"""Requests in the order of `SamplingParams.priority`: lower is sooner, ties by arrival."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernel_core.api import EngineContext, Manifest, RequestView, hookimpl

manifest = Manifest(name="priority", summary="lower priority numbers are served first and preempted last")


class PriorityPolicy:
    """Admits the most urgent first and preempts the least urgent, latest arrival first among equals."""

    def key(self, request: RequestView) -> tuple[Any, ...]:
        return (request.priority,)

    def refresh(self) -> Sequence[str]:
        return ()

    def chunk(self, request: RequestView, remaining: int, budget: int) -> int:
        return min(remaining, budget)

    def victim(self, running: Sequence[RequestView]) -> str:
        return max(running, key=lambda request: (request.priority, request.arrival)).id


@hookimpl
def make_policy(context: EngineContext) -> PriorityPolicy:
    return PriorityPolicy()
