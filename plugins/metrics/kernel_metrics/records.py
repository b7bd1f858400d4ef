"""What crosses between the processes."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Sample:
    """One time series. `labels` without those that all have. A histogram has `counts`, one for each bound of its series and one
    more, not accumulated, and `value` is its sum."""

    name: str
    labels: dict[str, str] = field(default_factory=dict)
    value: float = 0.0
    counts: list[int] = field(default_factory=list)


@dataclass(slots=True)
class HttpCounts:
    """What an API process counted since it last told: (method, route, status) → requests; route → seconds."""

    requests: list[tuple[str, str, int, int]] = field(default_factory=list)
    seconds: list[tuple[str, float, list[int]]] = field(default_factory=list)
