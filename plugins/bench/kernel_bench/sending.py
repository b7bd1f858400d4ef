"""Sends requests to an OpenAI-compatible server and notes when each piece of an answer came."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from kernel_bench.traffic import Planned
from kernel_core.api import RequestError

TIMEOUT = 3600.0  # seconds of one request


@dataclass(slots=True)
class Answered:
    """Seconds since the start of the run. `pieces`: when each piece with text came. `late`: how much later it was sent than
    planned, which is this program's own fault."""

    sent: float
    late: float = 0.0
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """A server: `url` without /v1."""

    url: str
    key: str | None
    model: str
    chat: bool
    fields: dict[str, Any]

    def body(self, planned: Planned) -> dict[str, Any]:
        text = {"messages": [{"role": "user", "content": planned.prompt}]} if self.chat else {"prompt": planned.prompt}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return {"model": self.model, "max_tokens": planned.max_tokens, **text, **stream, **self.fields}

    @property
    def route(self) -> str:
        return f"{self.url}/v1/{'chat/' if self.chat else ''}completions"


def headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


async def first_model(url: str, key: str | None) -> str:
    """The first name that the server lists. Raises RequestError when there is no server."""
    try:
        async with aiohttp.ClientSession(headers=headers(key)) as session, session.get(f"{url}/v1/models") as response:
            response.raise_for_status()
            return (await response.json())["data"][0]["id"]
    except (aiohttp.ClientError, OSError, ValueError, LookupError) as error:
        raise RequestError(f"no OpenAI-compatible server answers at {url}: {error} (start one: kernel serve)") from error


async def send_all(
    target: Target, planned: Sequence[Planned], concurrency: int | None, done: Callable[[Answered], None]
) -> list[Answered]:
    """In order of the plan. `concurrency`: so many at once, each followed by the next; None: at their times."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=TIMEOUT)
    async with aiohttp.ClientSession(headers=headers(target.key), connector=connector, timeout=timeout) as session:
        start = time.monotonic()

        async def one(plan: Planned) -> Answered:
            late = 0.0
            if plan.at is not None:
                await asyncio.sleep(max(0.0, start + plan.at - time.monotonic()))
                late = time.monotonic() - start - plan.at
            answered = Answered(time.monotonic() - start, late)
            await _send(session, target, plan, answered, start)
            done(answered)
            return answered

        if concurrency is None:
            return list(await asyncio.gather(*map(one, planned)))
        return await _closed_loop(one, planned, concurrency)


async def _closed_loop(one: Callable[[Planned], Any], planned: Sequence[Planned], concurrency: int) -> list[Answered]:
    waiting, answers = deque(enumerate(planned)), {}

    async def client() -> None:
        while waiting:
            number, plan = waiting.popleft()
            answers[number] = await one(plan)

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return [answers[number] for number in range(len(planned))]


async def _send(session: aiohttp.ClientSession, target: Target, plan: Planned, answered: Answered, start: float) -> None:
    try:
        async with session.post(target.route, json=target.body(plan)) as response:
            if response.status != 200:
                answered.error = f"status {response.status}: {(await response.text())[:200]}"
            else:
                async for line in response.content:
                    _note(line, answered, time.monotonic() - start)
    except (aiohttp.ClientError, TimeoutError, ValueError) as error:
        answered.error = f"{type(error).__name__}: {error}"
    answered.ended = time.monotonic() - start
    if answered.error is None and not answered.pieces:
        answered.error = "an answer without text"


def _note(line: bytes, answered: Answered, now: float) -> None:
    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
        return
    event = json.loads(line[6:])
    if event.get("error"):
        answered.error = str(event["error"].get("message"))
    usage = event.get("usage")
    if usage:
        answered.prompt_tokens, answered.output_tokens = usage["prompt_tokens"], usage["completion_tokens"]
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning") or delta.get("tool_calls"):
            answered.pieces.append(now)
