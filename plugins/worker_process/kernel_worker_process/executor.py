"""The engine's side: starts the process, sends plans, reads results, and notices when the process is gone."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from typing import NoReturn

from kernel_core import api
from kernel_core.api import (
    Allocation,
    EngineDeadError,
    KernelError,
    ModelInfo,
    StepPlan,
    StepResult,
    WorkerReport,
    decode,
    encode,
)
from kernel_worker_process import WorkerProcessSection
from kernel_worker_process.channel import ALLOCATE, CALL, CLOSE, FAILED, RUN, START, Channel

LAST_LINES = 20


class Stderr(threading.Thread):
    """Passes on what the process writes, and remembers the last lines for the message of its death."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        super().__init__(daemon=True, name="worker-stderr")
        self._process = process
        self.lines: deque[str] = deque(maxlen=LAST_LINES)
        self.start()

    def run(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            text = line.decode(errors="replace")
            self.lines.append(text)
            sys.stderr.write(text)
            sys.stderr.flush()


class Answer:
    """The answer to one message, read when it is wanted; those before it are read on the way."""

    def __init__(self, worker: WorkerProcess) -> None:
        self._worker = worker
        self.message: tuple[int, bytes] | None = None

    def payload(self) -> bytes:
        """Raises the error that the worker raised, if it is one of the kernel's, else EngineDeadError."""
        while self.message is None:
            self._worker.read_one()
        kind, payload = self.message
        if kind == FAILED:
            name, text, trace = decode(payload, tuple[str, str, str])
            if name:
                raise getattr(api, name)(text)
            raise EngineDeadError(f"the worker failed: {text}\n{trace}")
        return payload

    def result(self) -> StepResult:
        try:
            return decode(self.payload(), StepResult)
        except KernelError as error:
            raise EngineDeadError(str(error)) from error


class WorkerProcess:
    """Implements `Executor` with one spawned process. Any number of steps may be submitted before a result is read."""

    def __init__(self, plan: bytes, model: ModelInfo, section: WorkerProcessSection) -> None:
        self._plan, self._model = plan, model
        self._limit, self._step_limit = section.close_seconds, section.step_seconds
        self._patience: float | None = None  # for an answer; starting may take as long as it takes
        self._process: subprocess.Popen[bytes] | None = None
        self._pending: deque[Answer] = deque()
        self._dead: str | None = None

    def start(self) -> WorkerReport:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "kernel_worker_process.child", str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the engine
        )
        theirs.close()
        self._channel, self._stderr = Channel(ours), Stderr(self._process)
        report = decode(self._ask(START, encode((self._plan, self._model))).payload(), WorkerReport)
        return replace(report, capabilities=replace(report.capabilities, async_submit=True))

    def allocate(self, allocation: Allocation) -> None:
        self._ask(ALLOCATE, encode(allocation)).payload()
        self._patience = self._step_limit

    def submit(self, plan: StepPlan) -> Answer:
        return self._ask(RUN, encode(plan))

    def call(self, method: str, payload: bytes) -> list[bytes]:
        return [self._ask(CALL, encode((method, payload))).payload()]

    def _ask(self, kind: int, payload: bytes) -> Answer:
        if self._process is None or self._dead is not None:
            raise EngineDeadError(self._dead or "the worker process is not running: it was not started, or was closed")
        try:
            self._channel.send(kind, payload)
        except EOFError:
            self._died(self._process)
        self._pending.append(Answer(self))
        return self._pending[-1]

    def read_one(self) -> None:
        """Wait for the next answer. Raises EngineDeadError when the process is gone."""
        if self._process is None or self._dead is not None:
            raise EngineDeadError(self._dead or "the worker process was closed")
        try:
            message = self._channel.receive(self._patience)
        except EOFError:
            self._died(self._process)
        except TimeoutError:
            self._process.kill()
            self._died(self._process, f"hung: no answer for {self._patience:g} s (plugins.worker_process.step_seconds); ")
        self._pending.popleft().message = message

    def _died(self, process: subprocess.Popen[bytes], why: str = "") -> NoReturn:
        try:
            code = process.wait(self._limit)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        self._stderr.join(1.0)
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._dead = f"the worker process is gone ({why}{how}); its last lines were:\n{''.join(self._stderr.lines) or '(none)'}"
        raise EngineDeadError(self._dead)

    def close(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        deadline = time.monotonic() + self._limit
        try:
            self._channel.send(CLOSE)
            process.wait(self._limit)
        except (EOFError, subprocess.TimeoutExpired):
            process.kill()
        process.wait()
        self._channel.close()
        self._stderr.join(max(deadline - time.monotonic(), 0.1))
