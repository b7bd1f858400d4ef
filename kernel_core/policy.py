"""The kernel's own policy, first come first served. Others come as plugins (`make_policy`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kernel_core.protocols import RequestView


class FirstComeFirstServed:
    """Order of arrival; as large a chunk as there is room for; the latest arrival is preempted first."""

    def key(self, request: RequestView) -> tuple[Any, ...]:
        return ()

    def refresh(self) -> Sequence[str]:
        return ()

    def chunk(self, request: RequestView, remaining: int, budget: int) -> int:
        return min(remaining, budget)

    def victim(self, running: Sequence[RequestView]) -> str:
        return max(running, key=lambda request: request.arrival).id
