"""`AsyncEngine`: an engine in a thread of its own, requests as async iterators."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import Any, TypeVar

from pydantic import BaseModel

from kernel_core.config import KernelConfig
from kernel_core.engine import Engine, find_verb
from kernel_core.errors import EngineDeadError, KernelError
from kernel_core.intake import Accepted, Prompt
from kernel_core.outputs import Tracked
from kernel_core.protocols import TextCodec
from kernel_core.request import RequestOutput, SamplingParams

T = TypeVar("T")
logger = logging.getLogger("kernel_core")


class Stream:
    """What one iterator waits for. A reader that is slow gets the latest output, which holds everything before it."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._latest: RequestOutput | None = None
        self._error: Exception | None = None

    def put(self, output: RequestOutput | None, error: Exception | None = None) -> None:
        """In the reader's event loop."""
        self._latest, self._error = output or self._latest, error
        self._ready.set()

    async def next(self) -> RequestOutput:
        await self._ready.wait()
        self._ready.clear()
        if self._error is not None:
            raise self._error
        assert self._latest is not None
        return self._latest


class AsyncEngine:
    """Takes what `Engine` takes; the constructor blocks until the model is loaded. Use it as an async context manager or call
    `close`. Nothing runs while there are no requests.

    async for output in engine.generate("Hello", SamplingParams(max_tokens=8)): ...
    """

    def __init__(self, config: KernelConfig | Mapping[str, Any] | None = None, **keys: Any) -> None:
        self._engine = Engine(config, **keys)
        self._ids = count()
        self._intake = ThreadPoolExecutor(1, "kernel-intake")
        self._streams: dict[str, Stream] = {}  # used by the engine's thread only
        self._work = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kernel-engine", daemon=True)
        self._thread.start()

    # ---- for everybody, in any event loop

    @property
    def dead(self) -> str | None:
        """Why the engine takes nothing any more, or None."""
        return self._engine.dead

    @property
    def codec(self) -> TextCodec | None:
        return self._engine.codec

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def request_fields(self) -> Mapping[str, type[BaseModel]]:
        """The request fields that plugins registered: plugin → pydantic model."""
        return self._engine.intake.fields

    @property
    def summary(self) -> str:
        return self._engine.summary

    def get_default_sampling_params(self) -> SamplingParams:
        return self._engine.get_default_sampling_params()

    async def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, request_id: str | None = None, **sampling: Any
    ) -> AsyncIterator[RequestOutput]:
        """Yield the request's output whenever there is more of it, the whole each time; the last one is finished, with `error`
        set if the request failed. Ending the iteration early, or cancelling its task, aborts the request. Raises
        RequestError for an invalid request and EngineDeadError when the engine is gone."""
        name = f"async-{next(self._ids)}" if request_id is None else request_id
        params = self._engine.intake.params(**sampling) if params is None else params
        stream = Stream()
        accepted = await stream.loop.run_in_executor(self._intake, self._engine.intake.accept, name, prompt, params)
        finished = False
        self._send(lambda: self._add(accepted, stream))
        try:
            while not finished:
                output = await stream.next()
                finished = output.finished
                yield output
        finally:
            if not finished and self.dead is None:
                self._send(lambda: self._abandon(name, stream))

    async def abort(self, request_ids: str | Sequence[str]) -> None:
        """End requests; their iterators get a last output with finish_reason "abort"."""
        self._send(lambda: self._engine.abort(request_ids))

    async def call(self, method: str, payload: bytes = b"") -> list[bytes]:
        """Run the registered call "plugin.name" on every rank, between two steps."""
        return await self._ask(lambda: self._engine.call(method, payload))

    async def verb(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Run a verb that a plugin registered (`LLM`'s further methods), in a thread of its own. Raises AttributeError."""
        loop = asyncio.get_running_loop()
        verb = find_verb(self._engine.verbs, name)

        def call(method: str, payload: bytes = b"") -> list[bytes]:
            return asyncio.run_coroutine_threadsafe(self.call(method, payload), loop).result()

        return await asyncio.to_thread(verb, call, *arguments, **named)

    def service(self, name: str, protocol: type | None = None) -> Any:
        """A service of the face. Raises ConfigError when nobody provides it."""
        return self._engine.service(name, protocol)

    def params(self, **given: Any) -> SamplingParams:
        """Sampling parameters with the model's defaults for what is not given."""
        return self._engine.intake.params(**given)

    async def reset_cache(self) -> None:
        """Forget the KV of earlier requests, between two steps."""
        await self._ask(self._engine.reset_cache)

    def close(self) -> None:
        """Stop everything; idempotent. Iterators that still wait raise EngineDeadError."""
        with self._work:
            self._closing = True
            self._work.notify()
        self._thread.join()
        self._intake.shutdown()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.to_thread(self.close)

    def _send(self, command: Callable[[], None]) -> None:
        with self._work:
            if self._closing or self.dead is not None:
                raise EngineDeadError(self.dead or "the engine is closed")
            self._inbox.append(command)
            self._work.notify()

    async def _ask(self, function: Callable[[], T]) -> T:
        """Run it in the engine's thread, between two steps."""
        answer: Future[T] = Future()
        self._send(lambda: _settle(answer, function))
        return await asyncio.wrap_future(answer)

    # ---- in the engine's thread

    def _run(self) -> None:
        try:
            while self._engine.dead is None and not self._closing:
                for command in self._next_commands():
                    command()
                if self._engine.has_unfinished_requests():
                    self._deliver(self._engine.advance())
        except Exception as error:
            logger.exception("the engine's thread failed")
            self._engine.fail(f"the engine's thread failed: {type(error).__name__}: {error}")
        finally:
            self._end()

    def _next_commands(self) -> list[Callable[[], None]]:
        with self._work:
            while not (self._inbox or self._closing or self._engine.has_unfinished_requests()):
                self._work.wait()
            commands, self._inbox = self._inbox, []
        return commands

    def _add(self, accepted: Accepted, stream: Stream) -> None:
        try:
            self._engine.add(accepted)
            self._streams[accepted.request_id] = stream
        except KernelError as error:
            refusal = error
            _post(stream.loop, lambda: stream.put(None, refusal))

    def _abandon(self, request_id: str, stream: Stream) -> None:
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._engine.abort(request_id)

    def _deliver(self, changed: Sequence[Tracked]) -> None:
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Stream, RequestOutput]]] = defaultdict(list)
        for tracked in changed:
            output = tracked.output
            stream = self._streams.get(output.request_id)
            if stream is not None and not (output.error and self.dead):
                batches[stream.loop].append((stream, tracked.snapshot()))
                if output.finished:
                    del self._streams[output.request_id]
        for loop, batch in batches.items():
            if not _post(loop, lambda batch=batch: _put_all(batch)):
                self._engine.abort([output.request_id for _, output in batch])

    def _end(self) -> None:
        """Everybody who waits hears why, and so does who comes later."""
        with self._work:
            self._closing = True
            commands, self._inbox = self._inbox, []
        reason = self._engine.dead or "the engine is closed"
        self._engine.close()
        for command in commands:
            command()
        for stream in self._streams.values():
            _post(stream.loop, lambda stream=stream: stream.put(None, EngineDeadError(reason)))


def _post(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> bool:
    """Run it in the loop. False: the loop is closed, nobody listens."""
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:
        return False
    return True


def _put_all(batch: Sequence[tuple[Stream, RequestOutput]]) -> None:
    for stream, output in batch:
        stream.put(output)


def _settle(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001 it is the caller's
        future.set_exception(error)
