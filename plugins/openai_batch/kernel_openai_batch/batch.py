"""Sends rows to an ASGI application, many at once, and gives their lines in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable

import httpx

from kernel_core.api import EngineDeadError
from kernel_openai_batch.rows import Row, answer, bad_request, failure, refusal

AHEAD = 4  # times the concurrency: how far a slow row lets the others go on


async def lines(
    client: httpx.AsyncClient, rows: Iterable[Row], concurrency: int, dead: Callable[[], str | None]
) -> AsyncIterator[str]:
    """One output line a row, in order. `dead` says why there is no engine any more. Raises EngineDeadError, and then no line
    blames a row for it."""
    turn = asyncio.Semaphore(concurrency)
    waiting: deque[asyncio.Task[str]] = deque()
    try:
        for row in rows:
            waiting.append(asyncio.create_task(_line(client, row, turn, dead)))
            while len(waiting) >= AHEAD * concurrency or (waiting and waiting[0].done()):
                yield await waiting.popleft()
        while waiting:
            yield await waiting.popleft()
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _line(client: httpx.AsyncClient, row: Row, turn: asyncio.Semaphore, dead: Callable[[], str | None]) -> str:
    if row.request is None:
        return failure(row, "invalid_line", row.error or "")
    why = refusal(row.request)
    if why is not None:
        return bad_request(row, why)
    async with turn:
        try:
            response = await client.post(row.request.url, json=row.request.body)
        except httpx.HTTPError as error:
            _require_life(dead)
            return failure(row, "no_answer", f"{type(error).__name__}: {error}")
        _require_life(dead)
    request_id = response.headers.get("x-request-id", f"batch-{row.id}")
    try:
        body = response.json()
    except ValueError:
        return failure(row, "no_json", f"status {response.status_code} without JSON")
    if response.status_code == 404 and body["error"]["code"] == "unknown_url":
        return bad_request(row, f"url {row.request.url!r} is not served by this model")
    return answer(row, response.status_code, request_id, body)


def _require_life(dead: Callable[[], str | None]) -> None:
    reason = dead()
    if reason is not None:
        raise EngineDeadError(reason)
