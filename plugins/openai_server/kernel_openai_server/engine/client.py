"""`RemoteEngine`: the engine of another process, with the face `EngineClient`."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import numpy as np
from pydantic import BaseModel

from kernel_core import api
from kernel_core.api import (
    Accepted,
    EngineDeadError,
    EngineFacts,
    Intake,
    KernelError,
    ModelInfo,
    Outputs,
    RequestError,
    RequestOutput,
    ResolvedPlan,
    SamplingParams,
    TextCodec,
    Updates,
    decode,
    find_verb,
    open_face,
)
from kernel_openai_server.engine import messages
from kernel_openai_server.engine.joining import Steady
from kernel_openai_server.engine.link import Link
from kernel_openai_server.engine.messages import EngineLoad, pack, unpack

STARTING = "the engine is starting"
LOST = "the engine process is gone"
logger = logging.getLogger("kernel_openai_server")


class Stream:
    """What one iterator waits for. `fresh`: its output grew since it was read."""

    __slots__ = ("error", "fresh", "output", "waiter")

    def __init__(self, output: RequestOutput) -> None:
        self.output = output
        self.fresh = False
        self.error: KernelError | None = None
        self.waiter: asyncio.Future[None] | None = None

    def wake(self) -> None:
        self.fresh = True
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def fail(self, error: KernelError) -> None:
        self.error = error
        self.wake()


class RemoteEngine:
    """Implements `EngineClient`. Everything happens in one event loop; prompts are read in a thread. When the engine process
    dies, iterators raise EngineDeadError and `dead` says why; the same object serves again as soon as an engine answers at the
    address.

    Used as an async context manager. `ready()` waits for the engine."""

    def __init__(self, plan: ResolvedPlan, model: ModelInfo, address: str, name: str | None = None) -> None:
        self._face = open_face(plan, model)
        self._address, self._name = address, name or secrets.token_hex(4)  # ids are the engine's, which other processes use too
        self._ids, self._numbers = count(), count()
        self._intake_thread = ThreadPoolExecutor(1, "kernel-intake")
        self._outputs = Outputs(self._face.codec)
        self._streams: dict[str, Stream] = {}
        self._changed: dict[Any, None] = {}
        self._questions: dict[int, asyncio.Future[list[bytes]]] = {}
        self._dead: str | None = STARTING
        self._facts: EngineFacts | None = None
        self._intake: Intake | None = None
        self._handlers: Mapping[bytes, Callable[[Any], None]] = {
            messages.UPDATES: self._updates,
            messages.MORE: self._more,
            messages.ANSWER: self._answered,
            messages.FAILED: self._failed,
            messages.REFUSED: self._refused,
            messages.FACTS: self._started,
            messages.GONE: self._died,
        }

    async def __aenter__(self) -> RemoteEngine:
        self._alive = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._connect()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._link.close()
        self._end("the engine's face is closed")
        self._intake_thread.shutdown()
        self._face.close()

    async def ready(self) -> None:
        """Wait until the engine takes requests."""
        await self._alive.wait()

    # ---- what it is

    @property
    def codec(self) -> TextCodec | None:
        return self._face.codec

    @property
    def dead(self) -> str | None:
        return self._dead

    @property
    def facts(self) -> EngineFacts:
        """Of the last engine that answered. Raises EngineDeadError before the first."""
        if self._facts is None:
            raise EngineDeadError(STARTING)
        return self._facts

    @property
    def max_model_len(self) -> int:
        return self.facts.max_model_len

    @property
    def summary(self) -> str:
        return self.facts.summary

    @property
    def request_fields(self) -> Mapping[str, type[BaseModel]]:
        return {fields.plugin: fields.model for fields in self._face.fields if fields.model is not None}

    @property
    def unfinished(self) -> int:
        """User requests of this process that did not end."""
        return len(self._streams)

    def params(self, **given: Any) -> SamplingParams:
        return self._current().params(**given)

    def service(self, name: str, protocol: type | None = None) -> Any:
        return self._face.registry.service(name, protocol)

    # ---- requests

    async def generate(
        self, prompt: Any, params: SamplingParams | None = None, request_id: str | None = None, **sampling: Any
    ) -> AsyncIterator[RequestOutput]:
        """Yield the live output of the request whenever there is more in it; the last time it is finished. Ending the iteration
        early aborts the request. Raises RequestError for an invalid request, EngineDeadError when the engine is gone."""
        name = f"{self._name}-{next(self._ids)}" if request_id is None else request_id
        params = self.params(**sampling) if params is None else params
        accepted = await self._loop.run_in_executor(self._intake_thread, self._current().accept, name, prompt, params)
        stream = self._add(accepted)
        output = stream.output
        try:
            while True:
                if not stream.fresh:
                    stream.waiter = self._loop.create_future()
                    await stream.waiter
                stream.fresh = False
                if stream.error is not None:
                    raise stream.error
                finished = output.finished
                yield output
                if finished:
                    return
        finally:
            self._leave(name, stream)

    def _current(self) -> Intake:
        if self._intake is None or self._dead is not None:
            raise EngineDeadError(self._dead or STARTING)
        return self._intake

    def _add(self, accepted: Accepted) -> Stream:
        name = accepted.request_id
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        if name in self._outputs:
            raise RequestError(f"a request with the id {name!r} is running already; choose another id")
        message = pack(messages.ADD, accepted.requests)
        stream = self._streams[name] = Stream(self._outputs.add(accepted))
        self._link.send(message)
        return stream

    def _leave(self, name: str, stream: Stream) -> None:
        """The iterator ended. What still runs is aborted; its last updates are nobody's."""
        if self._streams.get(name) is stream:
            del self._streams[name]
            self._abort([name])

    async def abort(self, ids: str | Sequence[str]) -> None:
        self._abort([ids] if isinstance(ids, str) else ids)

    def _abort(self, names: Sequence[str]) -> None:
        sequences = self._outputs.core_ids(names)
        if sequences:
            self._link.send(pack(messages.ABORT, sequences))

    # ---- calls

    async def call(self, method: str, payload: bytes = b"") -> list[bytes]:
        """Run the registered call "plugin.name" in the engine part, or on every rank, between two steps."""
        if self._dead is not None:
            raise EngineDeadError(self._dead)
        number, answer = next(self._numbers), self._loop.create_future()
        self._questions[number] = answer
        self._link.send(pack(messages.ASK, (number, method, payload)))
        try:
            return await answer
        finally:
            self._questions.pop(number, None)

    async def reset_cache(self) -> None:
        await self.call(messages.RESET_CACHE)

    async def load(self) -> EngineLoad:
        """How full the engine is, over all API processes."""
        return decode((await self.call(messages.LOAD))[0], EngineLoad)

    async def verb(self, name: str, *args: Any, **kw: Any) -> Any:
        """Run a verb that a plugin registered, in a thread. Raises AttributeError."""
        verb = find_verb(self._face.verbs, name)

        def call(method: str, payload: bytes = b"") -> list[bytes]:
            return asyncio.run_coroutine_threadsafe(self.call(method, payload), self._loop).result()

        return await asyncio.to_thread(verb, call, *args, **kw)

    # ---- messages of the engine

    def _connect(self) -> None:
        self._told: tuple[str, ...] = ()  # the sequences of the last updates of this engine
        self._link = Link(self._address, self._received, self._deliver, self._lost)
        self._link.send(messages.HELLO)

    def _received(self, message: bytes) -> None:
        kind, body = unpack(message)
        self._handlers[kind](body)

    def _updates(self, steps: list[Updates]) -> None:
        for updates in steps:
            self._told = updates.requests
            changed, stopped = self._outputs.apply(updates)
            self._changed.update(dict.fromkeys(changed))
            if stopped:
                self._link.send(pack(messages.ABORT, stopped))

    def _more(self, tokens: np.ndarray) -> None:
        self._updates([Steady(self._told, tokens).updates()])

    def _deliver(self) -> None:
        """Everything that arrived is applied: a reader that is slow finds several steps in its output."""
        changed, self._changed = self._changed, {}
        streams = self._streams
        for tracked in changed:
            output = tracked.output
            stream = streams.get(output.request_id)
            if stream is not None and stream.output is output:
                stream.wake()
                if output.finished:
                    del streams[output.request_id]

    def _answered(self, body: tuple[int, list[bytes]]) -> None:
        number, answers = body
        question = self._questions.get(number)
        if question is not None and not question.done():
            question.set_result(answers)

    def _failed(self, body: tuple[int, str, str]) -> None:
        number, name, text = body
        question = self._questions.get(number)
        if question is not None and not question.done():
            question.set_exception(_error(name, text))

    def _refused(self, body: tuple[str, str]) -> None:
        name, text = body
        stream = self._streams.pop(name, None)
        if stream is not None:
            self._outputs.forget(name)
            stream.fail(RequestError(text))

    def _started(self, facts: EngineFacts) -> None:
        self._facts, self._intake, self._dead = facts, self._face.intake(facts), None
        self._alive.set()

    # ---- the engine's end

    def _lost(self) -> None:
        """The connection broke: wait for the next engine."""
        self._died(LOST)
        self._connect()

    def _died(self, reason: str) -> None:
        if self._dead is None:
            logger.error("%s; %d requests ended with this error", reason, len(self._streams))
        self._end(self._dead or reason)

    def _end(self, reason: str) -> None:
        """Nothing that runs goes on."""
        self._dead = reason
        self._alive.clear()
        streams, self._streams = self._streams, {}
        questions, self._questions = self._questions, {}
        self._outputs, self._changed = Outputs(self._face.codec), {}
        for stream in streams.values():
            stream.fail(EngineDeadError(reason))
        for question in questions.values():
            if not question.done():
                question.set_exception(EngineDeadError(reason))

    def stop(self, reason: str) -> None:
        """At the end of a drain: what runs here ends with this reason, new requests are refused."""
        self._abort(list(self._streams))
        self._end(reason)


def _error(name: str, text: str) -> KernelError:
    """The kernel's own errors keep their class."""
    kind = getattr(api, name, None)
    known = isinstance(kind, type) and issubclass(kind, KernelError)
    return kind(text) if known else KernelError(f"{name}: {text}")
