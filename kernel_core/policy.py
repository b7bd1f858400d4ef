"""The kernel's own policy, first come first served, and how several of plugins (`make_policy`) become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kernel_core.protocols import Policy, RequestView


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


class PolicyChain:
    """Several policies as one, with their plugins' names, the first the most important: whoever is equal for it is ordered by
    the next."""

    def __init__(self, policies: Sequence[tuple[str, Policy]]) -> None:
        self.policies = policies
        self.reads_hits = any(getattr(policy, "reads_hits", False) for _, policy in policies)

    def key(self, request: RequestView) -> tuple[Any, ...]:
        return tuple(policy.key(_own(request, plugin)) for plugin, policy in self.policies)

    def refresh(self) -> Sequence[str]:
        return list(dict.fromkeys(name for _, policy in self.policies for name in policy.refresh()))

    def chunk(self, request: RequestView, remaining: int, budget: int) -> int:
        return min(policy.chunk(_own(request, plugin), remaining, budget) for plugin, policy in self.policies)

    def victim(self, running: Sequence[RequestView]) -> str:
        plugin, first = self.policies[0]
        return first.victim([_own(request, plugin) for request in running])


def combined(policies: Sequence[tuple[str, Policy]]) -> Policy | None:
    """One of all. Rate: build."""
    if len(policies) > 1:
        return PolicyChain(policies)
    return policies[0][1] if policies else None


def _own(request: RequestView, plugin: str) -> RequestView:
    """With the payload of this plugin."""
    return replace(request, payload=request.payloads.get(plugin))
