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


@dataclass
class Job:
    """What to generate, and how to write it. `outputs` is filled while it runs, by place."""

    prompts: Sequence[PromptInput]
    params: SamplingParams
    name: str
    writer: Writer
    ended: Callable[[list[RequestOutput], BaseException | None], None] = lambda outputs, error: None
    outputs: dict[int, RequestOutput] = field(default_factory=dict)

    def finished(self) -> list[RequestOutput]:
        return [self.outputs[place] for place in sorted(self.outputs)]


async def run(engine: EngineClient, job: Job) -> AsyncIterator[tuple[int, RequestOutput]]:
    """(place, its output, which may be live) whenever there is more. Raises what the engine raises; an output that ended with an
    error raises ApiError."""
    sources = [
        engine.generate(prompt.given(), job.params, job.name if len(job.prompts) == 1 else f"{job.name}-{place}")
        for place, prompt in enumerate(job.prompts)
    ]
    merged = _single(sources[0]) if len(sources) == 1 else _many(sources)
    async with aclosing(merged):
        async for place, output in merged:
            job.outputs[place] = output
            if output.error is not None:
                raise ApiError(500, f"the request failed: {output.error}", SERVER, code="generation_failed")
            yield place, output


async def _single(source: AsyncIterator[RequestOutput]) -> AsyncIterator[tuple[int, RequestOutput]]:
    async with aclosing(source):  # type: ignore[type-var]
        async for output in source:
            yield 0, output


async def _many(sources: Sequence[AsyncIterator[RequestOutput]]) -> AsyncIterator[tuple[int, RequestOutput]]:
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
            for task in tasks:
                if task.done() and not task.cancelled() and task.exception() is not None:
                    task.result()
            for place in list(changed):
                yield place, changed.pop(place)
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
        server, error = self._server, None
        server.admit()
        server.unfinished += 1
        try:
            async with while_wanted(receive, server.section.request_seconds):
                await (self._events(send) if self._stream else self._whole(scope, receive, send))
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
            if EXCHANGE in scope:
                scope[EXCHANGE].outputs = outputs
            self._job.ended(outputs, error)

    async def _whole(self, scope: Any, receive: Receive, send: Send) -> None:
        async with aclosing(run(self._server.engine, self._job)) as running:
            async for _ in running:
                pass
        body = json_bytes(self._job.writer.whole(self._job.finished()))
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _events(self, send: Send) -> None:
        writer = self._job.writer
        async with aclosing(run(self._server.engine, self._job)) as running:
            async for place, output in running:
                data = writer.chunk(place, output)
                if not self._started:
                    self._started, data = True, writer.first() + data
                    await send({"type": "http.response.start", "status": 200, "headers": EVENTS})
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": writer.last(self._job.finished())})
