"""What a step costs the host: plan, commit and the loop around them, measured with a device that computes nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kernel_core.config import EngineConfig
from kernel_core.engine import EngineParts
from kernel_core.loop import PlainLoop
from kernel_core.plan import Allocation, KVGroup, SamplingRow, WorkerReport
from kernel_core.policy import combined
from kernel_core.protocols import Observer, Policy, Resource
from kernel_core.request import Request, Updates
from kernel_core.scheduler import Scheduler
from kernel_core.testing.null import NullExecutor

BLOCK = 16


class Stopwatch:
    """Wraps a function; `spent` holds the seconds of each call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.spent: list[float] = []

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        answer = self.function(*arguments)
        self.spent.append(time.perf_counter() - start)
        return answer


class Load:
    """Keeps `running` requests running: `churn` of them end in each step, and as many new ones arrive."""

    def __init__(self, scheduler: Scheduler, running: int, churn: float, prompt: int, steps: int) -> None:
        self.scheduler, self.running, self.prompt = scheduler, running, prompt
        self.life = round(1 / churn) if churn else steps + 100
        self.tokens = np.random.default_rng(0).integers(0, 1000, 1 << 20, np.int32)
        self.count = 0
        for i in range(running):
            self.add(1 + i * self.life // running if churn else self.life)

    def add(self, life: int) -> None:
        self.count += 1
        prompt = self.prompt + self.count % BLOCK  # so that blocks are taken in every step, not by all at once
        first = self.count * 31 % (self.tokens.size - prompt)  # no two prompts begin alike
        tokens = self.tokens[first : first + prompt]
        sampling, stops = SamplingRow(), frozenset({10**6})
        self.scheduler.add(Request(f"r{self.count}", tokens, sampling, self.count, prompt + life, stops))

    def emit(self, updates: Updates) -> None:
        for _ in range(int(np.count_nonzero(updates.finish))):
            self.add(self.life)


def run(
    running: int = 256,
    churn: float = 0.0,
    steps: int = 400,
    prompt: int = 128,
    policy: Policy | None = None,
    resources: Sequence[Resource] = (),
    observers: Sequence[Observer] = (),
    groups: Sequence[KVGroup] = (KVGroup("full", BLOCK, 1, ("null",)),),
    parts: Callable[[WorkerReport, Allocation], EngineParts] | None = None,
) -> dict[str, float]:
    """Milliseconds of plan + commit per step (median and 99th percentile), of `tend`, which runs while a device works, and
    microseconds of everything else that the loop does in a step (observers, arrivals, bookkeeping; the null device left out),
    after all prompts are computed. `parts`: makes the engine parts of plugins, for the sizes of the measurement."""
    length = prompt + (round(1 / churn) if churn else steps + 100) + 2 * BLOCK
    blocks = (running + 8) * -(-length // BLOCK) * 5 // 4 + 2
    allocation = Allocation((blocks,) * len(groups), running + running // 8 + 8, length, 1 << 20)
    config = EngineConfig(max_tokens_per_step=1 << 20, max_requests=allocation.max_slots)
    executor = NullExecutor(groups, max_model_len=length)
    report = executor.start()
    executor.allocate(allocation)
    made = (
        parts(report, allocation)
        if parts
        else EngineParts((("bench", policy),) if policy else (), tuple(resources), tuple(observers))
    )
    policy = combined(made.policies)
    scheduler = Scheduler(
        *(config, tuple(groups), allocation, report.capabilities, policy, made.resources), prefix_index=made.prefix_index
    )
    load = Load(scheduler, running, churn, prompt, steps)
    plan, commit = Stopwatch(scheduler.plan), Stopwatch(scheduler.commit)
    submit, finish, tend = Stopwatch(executor.submit), Stopwatch(executor.finish), Stopwatch(scheduler.tend)
    scheduler.plan, scheduler.commit, scheduler.tend = plan, commit, tend  # type: ignore[method-assign]
    executor.submit, executor.finish = submit, finish  # type: ignore[method-assign]
    step = Stopwatch(PlainLoop(scheduler, executor, load.emit if churn else (lambda updates: None), made.observers).step)
    for _ in range(steps + 20):
        step()
    pieces = [np.array(watch.spent[20:]) for watch in (step, plan, commit, tend, submit, finish)]
    host = (pieces[1] + pieces[2]) * 1e3
    rest = (pieces[0] - sum(pieces[1:])) * 1e6
    return {
        "running": running,
        "churn": churn,
        "steps": steps,
        "plan_commit_ms": round(float(np.median(host)), 4),
        "plan_ms": round(float(np.median(pieces[1])) * 1e3, 4),
        "commit_ms": round(float(np.median(pieces[2])) * 1e3, 4),
        "tend_ms": round(float(np.median(pieces[3])) * 1e3, 4),
        "p99_ms": round(float(np.percentile(host, 99)), 4),
        "dispatch_us": round(float(np.median(rest)), 2),
    }
