"""The in-process executor: one worker, in the engine's own process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from kernel_core.contexts import ModelInfo
from kernel_core.errors import EngineDeadError
from kernel_core.plan import Allocation, StepPlan, StepResult, WorkerReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernel_core.nn.worker import Worker
    from kernel_core.resolver import ResolvedPlan

T = TypeVar("T")


@dataclass(slots=True)
class StepHandle:
    """A submitted step: the result, or how to wait for it."""

    _result: StepResult | None
    _wait: Callable[[], StepResult]

    def result(self) -> StepResult:
        if self._result is None:
            self._result = _or_dead(self._wait)
        return self._result


class InProcessExecutor:
    """Implements `protocols.Executor`. torch is imported by `start`, not by this module."""

    def __init__(self, plan: ResolvedPlan, model: ModelInfo) -> None:
        self._plan, self._model = plan, model
        self._worker: Worker | None = None
        self._asynchronous = False

    def start(self) -> WorkerReport:
        from kernel_core.nn.worker import Worker

        self._worker = Worker(self._plan, self._model)
        report = self._worker.start()
        self._asynchronous = report.capabilities.async_submit
        return report

    def allocate(self, allocation: Allocation) -> None:
        self._running().allocate(allocation)

    def submit(self, plan: StepPlan) -> StepHandle:
        """A synchronous device runs the step here, so its handle is ready. Raises EngineDeadError when the step fails."""
        worker = self._running()
        pending = _or_dead(lambda: worker.submit(plan))
        return StepHandle(None if self._asynchronous else _or_dead(pending.result), pending.result)

    def call(self, method: str, payload: bytes) -> list[bytes]:
        return [self._running().call(method, payload)]

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _running(self) -> Worker:
        if self._worker is None:
            raise EngineDeadError("the executor is not running: it was not started, or was closed")
        return self._worker


def _or_dead(step: Callable[[], T]) -> T:
    try:
        return step()
    except Exception as error:
        raise EngineDeadError(f"the step failed in the worker: {type(error).__name__}: {error}") from error
