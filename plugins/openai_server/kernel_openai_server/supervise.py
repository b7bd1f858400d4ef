"""Starts the engine process and the API processes, starts again what dies, and stops everything in the right order."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from kernel_core.api import ConfigError, ModelInfo, ResolvedPlan, encode
from kernel_openai_server.child import framed
from kernel_openai_server.engine.messages import ApiJob, EngineJob
from kernel_openai_server.section import ServerSection

FIRST_DELAY, LONGEST_DELAY = 0.25, 30.0  # seconds before a process that died is started again; doubled each time
STEADY = 300.0  # seconds after which a life counts as a good one
CLOSE_SECONDS = 10.0  # for the engine process to end by itself
ADDRESS_LIMIT = 100  # characters of a Unix socket's path
logger = logging.getLogger("kernel_openai_server")


class StartError(Exception):
    """A process could not start; the text is the error of its own."""


class Child:
    """A running process that reports on its standard output and ends when its standard input does."""

    def __init__(self, process: asyncio.subprocess.Process, name: str) -> None:
        self.process, self.name = process, name
        self.born = time.monotonic()

    @classmethod
    async def start(cls, module: str, name: str, job: bytes, listener: socket.socket | None = None) -> Child:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", f"kernel_openai_server.{module}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=() if listener is None else (listener.fileno(),),
            limit=1 << 20,
            start_new_session=True,  # Ctrl-C is for the supervisor
        )
        assert process.stdin is not None
        process.stdin.write(framed(job))
        return cls(process, name)

    async def ready(self) -> dict[str, Any]:
        """Its report that it serves. Raises StartError when it fails instead."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        report = json.loads(line) if line else {}
        if report.get("kind") == "ready":
            return report
        await self.process.wait()
        raise StartError(report.get("text") or f"it ended before it was ready: {self.fate()}")

    def fate(self) -> str:
        code = self.process.returncode
        return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"

    def signal(self, number: int) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)

    async def end(self, seconds: float) -> None:
        """SIGTERM, and SIGKILL when that takes longer."""
        self.signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), seconds)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            await self.process.wait()


@dataclass
class Restarts:
    """How often a process was started again in a row."""

    limit: int
    count: int = 0

    def delay(self, lived: float) -> float | None:
        """Seconds to wait before the next life; None: it is enough."""
        self.count = 1 if lived > STEADY else self.count + 1
        return None if self.count > self.limit else min(FIRST_DELAY * 2 ** (self.count - 1), LONGEST_DELAY)


@dataclass
class Supervisor:
    """Runs in the event loop of `kernel serve`. `announce` is called with the engine's summary when everything serves."""

    plan: ResolvedPlan
    model: ModelInfo
    section: ServerSection
    listener: socket.socket
    announce: Callable[[str], None]
    children: dict[str, Child] = field(default_factory=dict)
    signals: int = 0

    async def run(self) -> int:
        """→ exit code: 0 after a signal, 1 when a process cannot start or dies too often."""
        self._stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled)
        with private_address() as address:
            keeping = asyncio.ensure_future(self._keep_everything(address))
            try:
                code = await self._until_stopped(keeping)
            finally:
                keeping.cancel()
                await self._kill()
        return code

    def _signalled(self) -> None:
        self.signals += 1
        self._stop.set()
        if self.signals > 1:
            for one in self.children.values():
                one.signal(signal.SIGKILL)

    async def _until_stopped(self, keeping: asyncio.Future[None]) -> int:
        stopping = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait([keeping, stopping], return_when=asyncio.FIRST_COMPLETED)
        if keeping.done():
            stopping.cancel()
            try:
                keeping.result()
            except StartError as error:
                sys.stderr.write(f"kernel serve: {error}\n")
            return 1
        keeping.cancel()
        await self._drain()
        return 0 if self.signals == 1 else 1

    async def _drain(self) -> None:
        """API processes end their requests first, then the engine goes."""
        self.listener.close()
        apis = [one for name, one in self.children.items() if name != "engine"]
        patience = self.section.drain_seconds + CLOSE_SECONDS
        await asyncio.gather(*(one.end(patience) for one in apis))
        if "engine" in self.children:
            await self.children["engine"].end(CLOSE_SECONDS)

    async def _kill(self) -> None:
        for one in self.children.values():
            one.signal(signal.SIGKILL)
        await asyncio.gather(*(one.process.wait() for one in self.children.values()))

    # ---- lives

    async def _keep_everything(self, address: str) -> None:
        """Raises StartError when something cannot be kept alive."""
        job = (self.plan.to_json(), self.model, address)
        engine = encode(EngineJob(*job))
        api = encode(ApiJob(*job, self.listener.fileno(), self.section.api_processes))
        starts = {"engine": lambda: Child.start("engine.process", "engine", engine)}
        for name in (f"api-{i}" for i in range(self.section.api_processes)):
            starts[name] = lambda name=name: Child.start("api_process", name, api, self.listener)
        loop = asyncio.get_running_loop()
        ready = [loop.create_future() for _ in starts]
        tasks = [asyncio.ensure_future(self._keep(name, start, event)) for (name, start), event in zip(starts.items(), ready)]
        try:
            await asyncio.gather(self._announce(ready), *tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _announce(self, ready: list[asyncio.Future[str]]) -> None:
        self.announce((await asyncio.gather(*ready))[0])

    async def _keep(self, name: str, start: Callable[[], Awaitable[Child]], ready: asyncio.Future[str]) -> None:
        """Start it, and start it again whenever it ends. The first start must succeed."""
        restarts = Restarts(self.section.max_restarts)
        while True:
            one = self.children[name] = await start()
            try:
                report = await one.ready()
                if not ready.done():
                    ready.set_result(report.get("summary", ""))
                elif restarts.count:
                    logger.warning("%s serves again", name)
                await one.process.wait()
                why = one.fate()
            except StartError as error:
                if not ready.done():
                    raise
                why = str(error)
            await self._pause(name, why, restarts.delay(time.monotonic() - one.born))

    async def _pause(self, name: str, why: str, delay: float | None) -> None:
        if delay is None:
            raise StartError(f"{name} died too often ({self.section.max_restarts} restarts in a row): {why}")
        logger.error("%s died (%s); it is started again in %g s", name, why, delay)
        await asyncio.sleep(delay)


@contextlib.contextmanager
def private_address() -> Iterator[str]:
    """A zmq address in a folder that only this user may enter."""
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        path = os.path.join(folder, "engine")
        if len(path) > ADDRESS_LIMIT:
            raise ConfigError(f"the folder for temporary files has a path too long for a socket: {path}; set TMPDIR=/tmp")
        yield f"ipc://{path}"
