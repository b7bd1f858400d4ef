"""What a worker sends of a profile. Plain data: the same in the worker's process and in the one that asks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Mode = Literal["modules", "operators", "trace"]
Kind = Literal["prefill", "decode", "mixed"]


@dataclass(frozen=True, slots=True)
class Start:
    """Payload of the call "profiling.start".

    modules: time every module. operators: also run torch.profiler, once a step. trace: also run torch.profiler over
    all steps, and leave the trace in the section's directory under a name that begins with `prefix`."""

    mode: Mode
    prefix: str = ""
    max_steps: int | None = None  # None: the section's


@dataclass(slots=True)
class Span:
    """One call of a module. Microseconds; `start` counts from the begin of the step. `parent`: index of the span around it,
    -1: none. `device` is the time on the device, `cpu` that of the host, which on a device that runs by itself is launching."""

    path: str  # of the module in its model, "" the model itself
    type: str
    parent: int
    start: float
    cpu: float = 0.0
    device: float = 0.0


@dataclass(slots=True)
class Operator:
    """An operator or device kernel in one step: microseconds of its own, and how often it ran."""

    name: str
    cpu: float
    device: float
    calls: int


@dataclass(slots=True)
class Step:
    """One step of one rank. `phases`: host microseconds by phase, in order, the first begins at `lead`. `trace`: Chrome JSON,
    empty unless asked for."""

    kind: Kind
    rows: int
    tokens: int
    cpu: float = 0.0
    device: float = 0.0
    lead: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    trace: bytes = b""


@dataclass(slots=True)
class Profile:
    """Answer of the call "profiling.stop". `files`: what was written, of the mode "trace"."""

    rank: int
    device: str
    steps: list[Step] = field(default_factory=list)
    files: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """Of either call; `error` says why it was refused."""

    error: str | None = None
    profile: Profile | None = None
