"""The two loops, side by side: plan → submit → result → commit → emit. One has a single step in flight, the other several."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from kernel_core.errors import EngineDeadError
from kernel_core.plan import StepPlan, StepResult
from kernel_core.protocols import Arrival, Executor, Handle, Observer, StepRecord
from kernel_core.request import FINISH_REASONS, Request, Updates
from kernel_core.scheduler import Scheduler

logger = logging.getLogger("kernel_core")
Emit = Callable[[Updates], None]


class PlainLoop:
    """One step at a time. Driven by the engine, in one thread.

    `emit` gets every `Updates`. When a worker dies or the loop fails, all requests end with that error and `step` raises
    EngineDeadError, from then on always."""

    def __init__(self, scheduler: Scheduler, executor: Executor, emit: Emit, observers: Sequence[Observer] = ()) -> None:
        self.scheduler, self.executor = scheduler, executor
        self.outlet = Outlet(scheduler, emit, observers)

    def step(self) -> bool:
        """Run one step. False: there was nothing to do."""
        with self.outlet:
            if not self.scheduler.plannable():
                return self.outlet.rest()
            planned_at = time.monotonic()
            plan = self.scheduler.plan()
            handle = self.executor.submit(plan)
            self.scheduler.tend()
            result = handle.result()
            updates = self.scheduler.commit(plan, result)
            self.outlet.emit(updates, plan, result, planned_at)
            return True

    def drain(self) -> None:
        """Commit what is in flight: nothing, between two steps."""


class OverlappedLoop:
    """The same with `depth` steps in flight: the next one is planned while the last one runs."""

    def __init__(
        self, scheduler: Scheduler, executor: Executor, emit: Emit, observers: Sequence[Observer] = (), depth: int = 2
    ) -> None:
        self.scheduler, self.executor, self.depth = scheduler, executor, depth
        self.outlet = Outlet(scheduler, emit, observers)
        self._flying: deque[tuple[StepPlan, Handle, float]] = deque()

    def step(self) -> bool:
        """Submit until `depth` steps are in flight, then finish the oldest. False: there was nothing to do."""
        with self.outlet:
            while len(self._flying) < self.depth and self.scheduler.plannable():
                planned_at = time.monotonic()
                plan = self.scheduler.plan()
                self._flying.append((plan, self.executor.submit(plan), planned_at))
                self.scheduler.tend()
            return self._commit() if self._flying else self.outlet.rest()

    def _commit(self) -> bool:
        plan, handle, planned_at = self._flying.popleft()
        result = handle.result()
        updates = self.scheduler.commit(plan, result)
        self.outlet.emit(updates, plan, result, planned_at)
        return True

    def drain(self) -> None:
        """Commit what is in flight without planning more; before a call that must run between two steps."""
        with self.outlet:
            while self._flying:
                self._commit()


class Outlet:
    """Where a loop's news go: `emit` and the prebound observers; as a context, it turns any failure into the end of all
    requests. An observer that raises is reported once and never called again."""

    def __init__(self, scheduler: Scheduler, emit: Emit, observers: Sequence[Observer]) -> None:
        self._scheduler, self._emit, self._observers = scheduler, emit, list(observers)
        self.dead: str | None = None  # why nothing goes on
        self._checked = True

    def added(self, request: Request) -> None:
        """The scheduler took it."""
        if self._observers:
            length, now = len(request.token_ids), time.monotonic()
            arrival = Arrival(request.id, request.family, length, request.max_len - length, request.priority, now)
            self._call(lambda observer: observer.added(arrival))

    def emit(self, updates: Updates, plan: StepPlan, result: StepResult, planned_at: float) -> None:
        """One step is committed."""
        self._emit(replace(updates, planned_at=planned_at) if updates.cached else updates)
        self._checked = False
        if self._observers:
            s = self._scheduler
            record = StepRecord(plan, result, planned_at, time.monotonic(), s.running, s.waiting, s.free_blocks, s.preemptions)
            self._call(lambda observer: observer.step(record))
        self._tell_finished()

    def rest(self) -> bool:
        """Nothing to plan: report what ended outside of steps, and check all counts once."""
        pending = self._scheduler.has_work()
        if pending:
            self._emit(self._scheduler.updates())
            self._tell_finished()
        if not self._checked:
            self._scheduler.check()
            self._checked = True
        return pending

    def _tell_finished(self) -> None:
        finished, self._scheduler.finished = self._scheduler.finished, []
        if self._observers:
            for request_id, code, prompt, output in finished:
                told = (request_id, FINISH_REASONS[code] or "", prompt, output)
                self._call(lambda observer, told=told: observer.finished(*told))

    def _call(self, verb: Callable[[Observer], None]) -> None:
        for observer in tuple(self._observers):
            try:
                verb(observer)
            except Exception:
                self._observers.remove(observer)
                logger.exception("observer %s failed and is disabled", type(observer).__qualname__)

    def __enter__(self) -> None:
        if self.dead is not None:
            raise EngineDeadError(self.dead)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            self.dead = str(error) or type(error).__name__
            self._emit(self._scheduler.fail_all(self.dead))
            self._tell_finished()
            if not isinstance(error, EngineDeadError):
                raise EngineDeadError(f"the engine's loop failed: {self.dead}") from error
