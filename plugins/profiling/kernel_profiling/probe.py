"""Times every module of a step by forward hooks, which are there only while a profile runs.

On a device that runs by itself the times come from events on its stream, read when the step is over. A graph that a device
replays calls no modules, so such steps have phases only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from time import perf_counter
from typing import Any

import torch
from torch import nn

from kernel_core.api import StepPlan
from kernel_core.nn.api import StepProbe
from kernel_profiling.records import Kind, Span, Step

Mark = Callable[[str], AbstractContextManager[Any]]
MICRO = 1e6
STEP = "step: "  # how the ranges of steps begin


def step_kind(plan: StepPlan) -> Kind:
    """decode: every row computes exactly what it samples from. A prompt's last chunk of one token looks the same."""
    decoding = (plan.q == plan.room) & (plan.room > 0)
    return "decode" if decoding.all() else "mixed" if decoding.any() else "prefill"


class ModuleProbe(StepProbe):
    """A `StepProbe`. `mark(name)` is entered around the step and every module call (a range in a trace); `done` gets every step
    that had rows."""

    def __init__(
        self, device: torch.device, models: Mapping[str, nn.Module], done: Callable[[Step], None], mark: Mark | None = None
    ) -> None:
        self._done, self._mark = done, mark or (lambda name: nullcontext())
        self._events = EventClock(device) if device.type != "cpu" else None
        self._step: Step | None = None
        self._open: list[tuple[int, AbstractContextManager[Any]]] = []
        self._handles = [handle for path, module in _modules(models) for handle in self._hook(path, module)]

    def remove(self) -> None:
        """Take the hooks off the modules."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ---- StepProbe

    def begin(self, plan: StepPlan) -> None:
        self._step = Step(step_kind(plan), len(plan.rows), int(plan.q.sum())) if len(plan.rows) else None
        if self._step is not None:
            name = f"{STEP}{self._step.kind}, {self._step.rows} rows, {self._step.tokens} tokens"
            self._open = [(-1, _entered(self._mark(name)))]
            self._start(-1)
            self._began = perf_counter()

    def end(self, plan: StepPlan, started: float, timings: Mapping[str, float]) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        step.cpu = (perf_counter() - self._began) * MICRO
        self._open.pop()[1].__exit__(None, None, None)
        self._stop(-1)
        step.lead = (started - self._began) * MICRO
        step.phases = {name: seconds * MICRO for name, seconds in timings.items() if name != "total"}
        self._fill_device(step)
        self._done(step)

    # ---- modules

    def _hook(self, path: str, module: nn.Module) -> Iterator[Any]:
        yield module.register_forward_pre_hook(partial(self._enter, path))
        yield module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, path: str, module: nn.Module, arguments: Any) -> None:
        if self._step is None:
            return
        index, spans = len(self._step.spans), self._step.spans
        spans.append(Span(path, type(module).__name__, self._open[-1][0], 0.0))
        self._open.append((index, _entered(self._mark(path or "model"))))
        self._start(index)
        spans[index].start = (perf_counter() - self._began) * MICRO

    def _leave(self, module: nn.Module, arguments: Any, result: Any) -> None:
        if self._step is None:
            return
        index, mark = self._open.pop()
        span = self._step.spans[index]
        span.cpu = (perf_counter() - self._began) * MICRO - span.start
        self._stop(index)
        mark.__exit__(None, None, None)

    # ---- the device's time

    def _start(self, index: int) -> None:
        if self._events is not None:
            self._events.start(index)

    def _stop(self, index: int) -> None:
        if self._events is not None:
            self._events.stop(index)

    def _fill_device(self, step: Step) -> None:
        if self._events is None:
            step.device = step.cpu
            for span in step.spans:
                span.device = span.cpu
            return
        times = self._events.read()
        step.device = times[-1]
        for index, span in enumerate(step.spans):
            span.device = times[index]


class EventClock:
    """Pairs of events on the device's current stream, by key. What is recorded into a graph has no time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pairs: dict[int, list[torch.Event | None]] = {}

    def start(self, key: int) -> None:
        self._pairs[key] = [self._record()]

    def stop(self, key: int) -> None:
        self._pairs[key].append(self._record())

    def read(self) -> dict[int, float]:
        """Microseconds by key; waits for the last one, and forgets all."""
        pairs, self._pairs = self._pairs, {}
        for _, last in pairs.values():
            if last is not None:
                last.synchronize()
        times = {key: first.elapsed_time(last) * 1e3 for key, (first, last) in pairs.items() if first and last}
        return dict.fromkeys(pairs, 0.0) | times

    def _record(self) -> torch.Event | None:
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        return event


def _modules(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """(path, module): those of the model by their own names, those of others under the name of theirs."""
    for name, model in models.items():
        for path, module in model.named_modules():
            yield (path if name == "model" else f"{name}.{path}".rstrip(".")), module


def _entered(mark: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    mark.__enter__()
    return mark
