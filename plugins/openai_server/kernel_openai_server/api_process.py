"""An API process: `python -m kernel_openai_server.api_process`, started by `supervise`. HTTP on one side, the engine process on
the other. SIGTERM: refuse new connections, let what runs end within `drain_seconds`, then end it with an error."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
import uvloop

from kernel_core.api import KernelError, ResolvedPlan, decode
from kernel_openai_server import child
from kernel_openai_server.engine.client import RemoteEngine
from kernel_openai_server.engine.messages import ApiJob
from kernel_openai_server.section import ServerSection, section_of

LAST_WORDS = 2.0  # seconds that responses have to end after the drain ended their requests


class HttpServer(uvicorn.Server):
    """uvicorn without its signals; says when it serves."""

    def __init__(self, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell_started = started

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._tell_started()


def http_config(app: Any, section: ServerSection) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        loop="uvloop",
        ws="none",
        lifespan="auto",
        log_level="warning",
        access_log=False,
        server_header=False,
        root_path=section.root_path,
        ssl_certfile=section.ssl_certfile,
        ssl_keyfile=section.ssl_keyfile,
        timeout_keep_alive=section.keep_alive_seconds,
        timeout_graceful_shutdown=int(section.drain_seconds + LAST_WORDS),
    )


async def serve(job: ApiJob, reports: child.Reports) -> None:
    """Until SIGTERM and the end of the drain."""
    plan = ResolvedPlan.from_json(job.plan)
    section = section_of(plan.config)
    async with RemoteEngine(plan, job.model, job.address) as engine:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, stop.set)
        if not await _first(engine.ready(), stop.wait()):
            return
        app = engine.service("openai/1").app(engine)
        server = HttpServer(http_config(app, section), lambda: _started(reports))
        draining = asyncio.create_task(_drain(stop, server, engine, section.drain_seconds))
        await server.serve([socket.socket(fileno=job.listener)])
        draining.cancel()


def _started(reports: child.Reports) -> None:
    gc.collect()
    gc.freeze()
    reports.send("ready")


async def _first(wanted: Any, other: Any) -> bool:
    """Did the first of the two end first?"""
    tasks = [asyncio.ensure_future(wanted), asyncio.ensure_future(other)]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in pending:
        task.cancel()
    return tasks[0] in done


async def _drain(stop: asyncio.Event, server: HttpServer, engine: RemoteEngine, seconds: float) -> None:
    await stop.wait()
    server.should_exit = True
    await asyncio.sleep(seconds)
    engine.stop("the server is stopping, and this request took longer than plugins.openai_server.drain_seconds")


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job, reports = child.adopt()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve(decode(job, ApiJob), reports))
    except KernelError as error:
        reports.failed(error)
        sys.exit(1)
    except Exception as error:
        reports.failed(error)
        raise


if __name__ == "__main__":
    main()
