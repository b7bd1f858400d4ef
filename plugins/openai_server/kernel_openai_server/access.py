"""Pure ASGI layers around the application, outermost first: `Exchanges` (ids, records), CORS, `Heads`, `Keys`,
`Bodies`."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Protocol

from starlette.routing import BaseRoute, Match

from kernel_core.api import RequestOutput
from kernel_openai_server.answering import EXCHANGE
from kernel_openai_server.errors import AUTHENTICATION, ApiError

Scope = Any
Application = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
logger = logging.getLogger("kernel_openai_server")


@dataclass(slots=True)
class Exchange:
    """One HTTP request and what came of it, for observers. `route` is the path as it is declared ("/v1/models/{name}"), "" if
    there is none; `status` 0: the client went before an answer. Seconds are relative to `started` (monotonic clock). `outputs`:
    what the engine made for it, finished or not; `headers`: of the request, as ASGI has them."""

    request_id: str
    method: str
    path: str
    headers: Sequence[tuple[bytes, bytes]]
    started: float = field(default_factory=time.monotonic)
    route: str = ""
    status: int = 0
    first_byte: float | None = None
    send_body: Any = None  # for bodies after the start of a response: the layers between have no interest in them
    finished: float | None = None
    outputs: list[RequestOutput] = field(default_factory=list)


class HttpObserver(Protocol):
    """Returned by the hook `watch_http`. May not raise: an error is logged and the observer is left out from then on."""

    def finished(self, exchange: Any) -> None:
        """An HTTP request ended, in whatever way. In the event loop. Rate: request."""
        ...


class Exchanges:
    """Gives every answer an X-Request-Id (the client's own, where it is a plain one) and every observer a record."""

    def __init__(self, app: Application, observers: Sequence[tuple[str, HttpObserver]], log: bool) -> None:
        self._app, self._observers, self._log = app, list(observers), log

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        given = next((value for name, value in headers if name == b"x-request-id"), b"")
        name = given if REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}".encode()
        exchange = scope[EXCHANGE] = Exchange(name.decode(), scope["method"], scope["path"], headers)

        exchange.send_body = send

        async def identified(message: Any) -> None:
            if message["type"] == "http.response.start":
                exchange.status, exchange.first_byte = message["status"], time.monotonic() - exchange.started
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", name)]
            await send(message)

        try:
            await self._app(scope, receive, identified)
        finally:
            exchange.finished = time.monotonic() - exchange.started
            exchange.route = getattr(scope.get("route"), "path", "")
            self._tell(exchange)

    def _tell(self, exchange: Exchange) -> None:
        if self._log:
            seconds = exchange.finished or 0.0
            logger.warning("%s %s %s %d %.3f s", exchange.request_id, exchange.method, exchange.path, exchange.status, seconds)
        for plugin, observer in tuple(self._observers):
            try:
                observer.finished(exchange)
            except Exception:
                logger.exception("the HTTP observer of the plugin %r failed and is left out from now on", plugin)
                self._observers.remove((plugin, observer))


class Heads:
    """HEAD is GET without the body, on every route that has GET."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Any) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        inner = {**scope, "method": "GET"}
        try:
            await self._app(inner, receive, without_body)
        finally:
            scope["route"] = inner.get("route")


class Keys:
    """Only requests with a key, except to public routes. Keys are compared in constant time, and all of them."""

    def __init__(self, app: Application, keys: Sequence[str], public: Sequence[BaseRoute]) -> None:
        self._app, self._public = app, public
        self._keys = [sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or self._is_known(scope["headers"]) or self._is_public(scope):
            await self._app(scope, receive, send)
            return
        message = "this server needs an API key: send 'Authorization: Bearer KEY' with one that it knows"
        headers = {"www-authenticate": "Bearer"}
        refusal = ApiError(401, message, AUTHENTICATION, code="invalid_api_key", headers=headers)
        await refusal.response()(scope, receive, send)

    def _is_known(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = sha256(key.strip()).digest()
        found = [hmac.compare_digest(digest, known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(found)

    def _is_public(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] == Match.FULL for route in self._public)


def is_public(route: BaseRoute) -> bool:
    """Does its handler carry `public = True`?"""
    handler = getattr(route, "endpoint", None) or getattr(route, "app", None)
    return getattr(handler, "public", False) is True


class Bodies:
    """The whole body is read first: at most so many bytes, within so many seconds."""

    def __init__(self, app: Application, max_bytes: int, seconds: float) -> None:
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            message = f"the body did not arrive within {self._seconds:g} s"
            await ApiError(408, message, code="body_timeout").response()(scope, receive, send)
            return
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:
            return  # the client went
        waiting = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return waiting.pop() if waiting else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Any) -> bytes | None:
        """None: the client went. Raises ApiError."""
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        size = int(announced) if announced.isdigit() else 0
        parts: list[bytes] = []
        while size <= self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size = max(size, sum(map(len, parts)))
            if not message.get("more_body", False) and size <= self._max_bytes:
                return b"".join(parts)
        raise ApiError(
            413, f"the body is larger than {self._max_bytes} bytes (plugins.openai_server.max_body_bytes)", code="body_too_large"
        )
