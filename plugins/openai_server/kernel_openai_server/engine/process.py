"""The engine process: `python -m kernel_openai_server.engine.process`, started by `supervise`.

One thread: messages of API processes, then a step, then what changed goes out, one message per API process. It blocks only
when there is nothing to do."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType

import zmq

from kernel_core.api import (
    EngineDeadError,
    EnginePart,
    KernelError,
    Request,
    RequestError,
    ResolvedPlan,
    Updates,
    decode,
    encode,
    open_engine,
)
from kernel_openai_server import child
from kernel_openai_server.engine import messages
from kernel_openai_server.engine.joining import Joiner, Steady
from kernel_openai_server.engine.messages import EngineJob, EngineLoad, pack, unpack
from kernel_openai_server.engine.routing import Owners

SHARE = 0.01  # of its time that the loop may spend on messages: steps that are too short for that have a turn together,
TURN_SECONDS = 0.008  # but nothing waits for longer,
URGENT_SECONDS = 0.001  # and first tokens, ends and whatever else is more than the next token of a stream not even for that
GATE_MS = 1  # how long to wait for messages when all requests wait at a gate
FAREWELL_MS = 1000  # how long the reason of the end may take to reach the API processes
logger = logging.getLogger("kernel_openai_server")


class EngineProcess:
    """Joins a started engine and a bound ROUTER socket."""

    def __init__(self, socket: zmq.Socket[bytes]) -> None:
        self._socket = socket
        self._poller = zmq.Poller()
        self._poller.register(socket, zmq.POLLIN)
        self._owners = Owners()
        self._clients: set[bytes] = set()
        self._told: dict[bytes, tuple[str, ...]] = {}  # by API process, the sequences of its last updates
        self._pending = Joiner()
        self._part: EnginePart | None = None

    @property
    def emit(self) -> Callable[[Updates], None]:
        """For the engine. Sent after the step, because the last ones of a failing step are not meant for requests."""
        return self._pending.add

    def run(self, part: EnginePart) -> None:
        """Until a signal, or the engine's death, which all API processes are told. Raises EngineDeadError then."""
        self._part = part
        scheduler, step, pending = part.core.scheduler, part.core.loop.step, self._pending
        try:
            turned = pause = 0.0
            while True:
                worked = step()
                now = time.monotonic()
                if worked and now - turned < (URGENT_SECONDS if pending.urgent else pause):
                    continue
                self._flush()
                self._receive(0 if worked else GATE_MS if scheduler.unfinished else None)
                turned, pause = now, min((time.monotonic() - now) / SHARE, TURN_SECONDS) if worked else 0.0
        except EngineDeadError as error:
            for identity in tuple(self._clients):
                self._send(identity, pack(messages.GONE, str(error)))
            raise

    # ---- in

    def wake_by(self, handle: int) -> None:
        """A readable file descriptor ends the wait for messages, so that a signal cannot come too early to be noticed."""
        self._poller.register(handle, zmq.POLLIN)

    def _receive(self, wait: int | None) -> None:
        """Handle all messages that are there; before that, wait for one (milliseconds; None: for ever)."""
        if wait != 0:
            self._poller.poll(wait)
        while self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._handle(*self._socket.recv_multipart(zmq.NOBLOCK))

    def _handle(self, identity: bytes, message: bytes) -> None:
        kind, body = unpack(message)
        if kind == messages.ADD:
            self._add(identity, body)
        elif kind == messages.ABORT:
            self._engine.core.scheduler.abort(self._owners.keep_own(identity, body))
        elif kind == messages.ASK:
            self._ask(identity, *body)
        elif kind == messages.HELLO:
            self._clients.add(identity)
            self._send(identity, pack(messages.FACTS, self._engine.facts))

    @property
    def _engine(self) -> EnginePart:
        assert self._part is not None
        return self._part

    def _add(self, identity: bytes, requests: tuple[Request, ...]) -> None:
        added: list[str] = []
        try:
            for request in requests:
                self._engine.core.add(request)
                added.append(request.id)
        except RequestError as error:
            self._engine.core.scheduler.abort(added)
            self._send(identity, pack(messages.REFUSED, (requests[0].family or requests[0].id, str(error))))
        else:
            self._owners.add(identity, added)

    def _ask(self, identity: bytes, number: int, method: str, payload: bytes) -> None:
        try:
            answers = self._answer(method, payload)
        except Exception as error:  # noqa: BLE001 it is the caller's
            self._send(identity, pack(messages.FAILED, (number, type(error).__name__, str(error))))
        else:
            self._send(identity, pack(messages.ANSWER, (number, answers)))

    def _answer(self, method: str, payload: bytes) -> list[bytes]:
        core = self._engine.core
        if method == messages.RESET_CACHE:
            core.loop.drain()
            core.scheduler.reset_cache()
            return []
        if method == messages.LOAD:
            return [encode(self._load())]
        return core.call(method, payload)

    def _load(self) -> EngineLoad:
        core, scheduler = self._engine.core, self._engine.core.scheduler
        if not scheduler.unfinished:  # what the last requests held is given back with the next plan, or now
            core.loop.drain()
            scheduler.kv.reclaim(scheduler.slots.last_plan)
        blocks = tuple(n - 1 for n in core.allocation.num_blocks)
        return EngineLoad(scheduler.running, scheduler.waiting, scheduler.free_blocks, blocks)

    # ---- out

    def _flush(self) -> None:
        parts: dict[bytes, list[Updates | Steady]] = {}
        for news in self._pending.take():
            for identity, part in self._owners.divide(news):
                parts.setdefault(identity, []).append(part)
        for identity, own in parts.items():
            told, self._told[identity] = self._told.get(identity), own[-1].requests
            if len(own) == 1 and isinstance(own[0], Steady) and own[0].requests == told:
                self._send(identity, pack(messages.MORE, own[0].tokens))
            else:
                whole = [part.updates() if isinstance(part, Steady) else part for part in own]
                self._send(identity, pack(messages.UPDATES, whole))

    def _send(self, identity: bytes, message: bytes) -> None:
        try:
            self._socket.send_multipart((identity, message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._vanished(identity)

    def _vanished(self, identity: bytes) -> None:
        self._clients.discard(identity)
        self._told.pop(identity, None)
        ids = self._owners.forget(identity)
        if ids:
            logger.warning("an API process is gone: its %d sequences are aborted", len(ids))
            self._engine.core.scheduler.abort(ids)


@contextlib.contextmanager
def bound(address: str) -> Iterator[zmq.Socket[bytes]]:
    """A ROUTER socket that says when a message cannot be delivered."""
    context = zmq.Context()
    socket = messages.configure(context.socket(zmq.ROUTER))
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.bind(address)
    try:
        yield socket
    finally:
        socket.close(FAREWELL_MS)
        context.term()


def serve(job: EngineJob, reports: child.Reports) -> None:
    """Start the engine, report "ready", run it until SIGTERM. Raises what stops it."""
    with bound(job.address) as socket:
        process = EngineProcess(socket)
        process.wake_by(_signal_pipe())
        part = open_engine(ResolvedPlan.from_json(job.plan), job.model, process.emit)
        try:
            gc.collect()
            gc.freeze()  # what lives as long as the process is never looked at again
            reports.send("ready", summary=part.facts.summary)
            process.run(part)
        finally:
            part.close()


def _signal_pipe() -> int:
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    return readable


def _stop(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> None:
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job, reports = child.adopt()
    try:
        serve(decode(job, EngineJob), reports)
    except KernelError as error:
        reports.failed(error)
        sys.exit(1)
    except Exception as error:
        reports.failed(error)
        raise


if __name__ == "__main__":
    main()
