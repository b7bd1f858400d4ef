"""Hook specifications of this plugin. Others implement them with `@hookimpl(optionalhook=True)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernel_core.api import BuildContext, home, hookspec

if TYPE_CHECKING:
    from fastapi import APIRouter

    from kernel_openai_server.access import HttpObserver
    from kernel_openai_server.client import EngineClient


@hookspec
@home("face", composes="all")
def register_routes(context: BuildContext, engine: EngineClient) -> APIRouter | None:
    """Add routes to the server. Called once per API process, when the application is made; `engine` is what its handlers use
    (`AsyncEngine`, or the same face of an engine in another process). None: nothing to add.

    Routes ask for the API key like all others. A route is open without it when its handler carries the attribute
    `public = True`: for liveness and static files, never for data. Two routes with one path and method are a start-up error
    naming both plugins."""
    raise NotImplementedError


@hookspec
@home("face", composes="all")
def watch_http(context: BuildContext) -> HttpObserver | None:
    """Make an object with `finished(exchange)`, called in the event loop when an HTTP request ended, in whatever way.

    `exchange` has `request_id` (what X-Request-Id says), `method`, `path`, `route` ("/v1/models/{name}"), `headers`, `status` (0:
    the client went first), `started` (monotonic clock), `first_byte` and `finished` (seconds since then, or None) and `outputs`
    (the `RequestOutput`s of the engine: tokens, timings, finish reasons). Called once per API process."""
    raise NotImplementedError
