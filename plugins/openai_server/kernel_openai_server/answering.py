"""One generating HTTP request from its first token to its end: the engine's outputs, the client that may go away, limits, errors.

A client that is gone ends the iteration of the engine's outputs, and that aborts what runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import Response

from kernel_core.api import RequestOutput, SamplingParams
from kernel_openai_server.client import EngineClient
from kernel_openai_server.errors import BUSY, RETRY, SERVER, ApiError, api_error
from kernel_openai_server.protocol.objects import DONE, event, json_bytes
from kernel_openai_server.rendering import PromptInput
from kernel_openai_server.section import ServerSection

Send = Callable[[Any], Awaitable[None]]
Receive = Callable[[], Awaitable[Any]]
EVENTS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
EXCHANGE = "kernel.exchange"  # in the scope: the record of a request that observers get


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Writer(Protocol):
    """Makes the answer of one kind out of outputs, which grow. `place`: which prompt."""

    def first(self) -> bytes:
        """Events before the first output."""
        ...

    def chunk(self, place: int, output: RequestOutput) -> bytes:
        """Events for what is new in it; b"": nothing. Rate: chunk."""
        ...

    def last(self, outputs: list[RequestOutput]) -> bytes:
        """Events after everything ended."""
        ...

    def failed(self, error: ApiError) -> bytes:
        """Events that end a stream early."""
        ...

    def whole(self, outputs: list[RequestOutput]) -> Any:
        """The answer without a stream: something for msgspec."""
        ...


class EventWriter:
    """What most streams do: no first event, and [DONE] at the end."""

    def first(self) -> bytes:
        return b""

    def failed(self, error: ApiError) -> bytes:
        return event(error.body) + DONE


@dataclass
class Answering:
    """Runs jobs on an engine. One per application."""

    engine: EngineClient
    section: ServerSection
    unfinished: int = 0

    def admit(self) -> None:
        """Raises ApiError (429) when the queue is full."""
        limit = self.section.max_queue
        if limit is not None and self.unfinished >= max(1, limit // self.section.api_processes):
            message = f"{self.unfinished} requests are waiting or running already; try again later"
            raise ApiError(429, message, BUSY, code="queue_full", headers=RETRY)

    def answer(self, job: Job, stream: bool) -> Response:
        return Answer(self, job, stream)

    async def detached(self, job: Job) -> None:
        """Run it although nobody waits; `job.ended` hears of errors too."""
        self.unfinished += 1
        error: BaseException | None = None
        try:
            async with asyncio.timeout(self.section.request_seconds), aclosing(job.start(self.engine)) as outputs:  # type: ignore[type-var]
                async for output in outputs:
                    job.take(output)
        except BaseException as problem:  # it is the job's
            error = problem
            if not isinstance(problem, Exception):
                raise
        finally:
            self.unfinished -= 1
            job.ended(job.finished(), error)


def _nothing(outputs: list[RequestOutput], error: BaseException | None) -> None:
    """Nobody wants to know how a job ended."""


@dataclass
class Job:
    """What to generate, and how to write it. `ended` is told how it went."""

    prompts: Sequence[PromptInput]
    params: SamplingParams
    name: str
    writer: Writer
    ended: Callable[[list[RequestOutput], BaseException | None], None] = _nothing
    places: dict[str, int] = field(default_factory=dict)  # by the engine's id
    outputs: dict[str, RequestOutput] = field(default_factory=dict)

    def start(self, engine: EngineClient) -> AsyncIterator[RequestOutput]:
        """Every output, which may be a live object, whenever there is more in it."""
        names = [self.name] if len(self.prompts) == 1 else [f"{self.name}-{place}" for place in range(len(self.prompts))]
        self.places = {name: place for place, name in enumerate(names)}
        sources = [engine.generate(prompt.given(), self.params, name) for prompt, name in zip(self.prompts, names)]
        return sources[0] if len(sources) == 1 else merged(sources)

    def take(self, output: RequestOutput) -> int:
        """→ its place. Raises ApiError when it failed. Rate: chunk."""
        self.outputs[output.request_id] = output
        if output.error is not None:
            raise ApiError(500, f"the request failed: {output.error}", SERVER, code="generation_failed")
        return self.places[output.request_id]

    def finished(self) -> list[RequestOutput]:
        """By place."""
        return [self.outputs[name] for name in self.places if name in self.outputs]


async def merged(sources: Sequence[AsyncIterator[RequestOutput]]) -> AsyncIterator[RequestOutput]:
    """All at once. A reader that is slow gets the latest output of each."""
    changed: dict[int, RequestOutput] = {}
    news = asyncio.Event()

    async def read(place: int, source: AsyncIterator[RequestOutput]) -> None:
        try:
            async with aclosing(source):  # type: ignore[type-var]
                async for output in source:
                    changed[place] = output
                    news.set()
        finally:
            news.set()

    tasks = [asyncio.ensure_future(read(place, source)) for place, source in enumerate(sources)]
    try:
        while changed or not all(task.done() for task in tasks):
            await news.wait()
            news.clear()
            for place in list(changed):
                yield changed.pop(place)
            for task in tasks:
                if task.done():
                    task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def while_wanted(receive: Receive, seconds: float | None) -> AsyncIterator[None]:
    """Cancels what is inside when the client goes (ClientGoneError) or it takes too long (TimeoutError)."""
    task, gone = asyncio.current_task(), False
    assert task is not None

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        async with asyncio.timeout(seconds):
            yield
    except asyncio.CancelledError:
        if not gone or task.uncancel() > 0:
            raise
        raise ClientGoneError from None
    finally:
        watcher.cancel()


class Answer(Response):
    """The response of a job: an ASGI application that generates while it answers. Errors before the first output have a status of
    their own; later ones are the last event."""

    def __init__(self, server: Answering, job: Job, stream: bool) -> None:
        super().__init__()
        self._server, self._job, self._stream = server, job, stream
        self._started = False

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        server, exchange, error = self._server, scope.get(EXCHANGE), None
        server.admit()
        server.unfinished += 1
        try:
            async with while_wanted(receive, server.section.request_seconds):
                if self._stream:
                    await self._stream_out(send, exchange.send_body if exchange is not None else send)
                else:
                    await self._whole(scope, receive, send)
        except ClientGoneError as problem:
            error = problem
        except Exception as problem:
            error = problem
            if not self._started:
                raise
            await send({"type": "http.response.body", "body": self._job.writer.failed(api_error(problem))})
        finally:
            server.unfinished -= 1
            outputs = self._job.finished()
            if exchange is not None:
                exchange.outputs = outputs
            self._job.ended(outputs, error)

    async def _stream_out(self, send: Send, send_body: Send) -> None:
        """In a task of its own: every wake-up would walk through all layers of the application."""
        task = asyncio.ensure_future(self._events(send, send_body))
        try:
            await task
        finally:
            if not task.done():  # this one was cancelled
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def _whole(self, scope: Any, receive: Receive, send: Send) -> None:
        job = self._job
        async with aclosing(job.start(self._server.engine)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                job.take(output)
        await Response(json_bytes(job.writer.whole(job.finished())), media_type="application/json")(scope, receive, send)

    async def _events(self, send: Send, send_body: Send) -> None:
        job, writer = self._job, self._job.writer
        async with aclosing(job.start(self._server.engine)) as outputs:  # type: ignore[type-var]
            async for output in outputs:
                place = job.take(output)
                if not self._started:
                    self._started, opening = True, writer.first()
                    await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
                    data = opening + writer.chunk(place, output)
                else:
                    data = writer.chunk(place, output)
                if data:
                    await send_body({"type": "http.response.body", "body": data, "more_body": True})
        await send_body({"type": "http.response.body", "body": writer.last(job.finished())})
