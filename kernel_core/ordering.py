"""The order of plugins: declared by before, after and services, then by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from kernel_core.enabling import Configured
from kernel_core.errors import ConfigError

Edges = Mapping[tuple[str, str], str]  # (first, second) → why


def in_order(parts: Sequence[Configured], edges: Edges) -> list[Configured]:
    """Topological; `parts` come sorted by name, which decides where nothing is declared. Raises ConfigError for a circle."""
    left, ordered = list(parts), []
    while left:
        names = {part.name for part in left}
        free = next((p for p in left if not any(second == p.name and first in names for first, second in edges)), None)
        if free is None:
            raise ConfigError(_circle(names, edges))
        left.remove(free)
        ordered.append(free)
    return ordered


def declared(parts: Sequence[Configured], providers: Mapping[str, str]) -> Edges:
    """What manifests say about those that take part. "*" stands for all that do not say the same."""
    names = {part.name for part in parts}
    edges: dict[tuple[str, str], str] = {}
    for part in parts:
        for field, first in (("before", True), ("after", False)):
            said = set(getattr(part.manifest, field))
            if "*" in said:
                said |= {p.name for p in parts if "*" not in getattr(p.manifest, field)}
            for other in said & names - {part.name}:
                edges[(part.name, other) if first else (other, part.name)] = f"{part.name} says {field}"
        for service in (*part.manifest.requires, *part.manifest.uses):
            if providers.get(service, part.name) in names - {part.name}:
                edges.setdefault((providers[service], part.name), f"it provides {service}")
    return edges


def _circle(names: Iterable[str], edges: Edges) -> str:
    """Walk backwards from any plugin that waits until one repeats."""
    names = set(names)
    walk = [min(names)]
    while walk.count(walk[-1]) < 2:
        walk.append(min(a for a, b in edges if b == walk[-1] and a in names))
    circle = walk[walk.index(walk[-1]) :][::-1]
    reasons = "; ".join(f"{a} before {b}: {edges[a, b]}" for a, b in pairwise(circle))
    return f"the plugins' order is a circle, {' → '.join(circle)} ({reasons}): leave one out with `plugins.NAME = false`"
