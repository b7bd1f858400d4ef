"""The ASGI application: the service "openai/1".

What other plugins add:

- **Request fields.** Every field of `register_fields` is a field of /v1/completions, /v1/chat/completions and /v1/responses,
  shown in /docs and checked like the others. It reaches the plugin as `engine.params(field=value)` does.
- **Routes and records.** `register_routes` and `watch_http`: see `hooks`. A handler may raise RequestError (400), EngineDeadError
  (503) or starlette's HTTPException; all become OpenAI error objects.
- **response_format.** It goes to the provider of "grammar/1" (`grammar.Grammar`), whose answer is request fields.
- **Tools and reasoning.** They go to the provider of "tools/1" (`tools.Tools`)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from kernel_core.api import BuildContext, ConfigError
from kernel_openai_server import errors, openapi
from kernel_openai_server.access import Application, Bodies, Exchanges, Heads, Keys, is_public
from kernel_openai_server.api import Api
from kernel_openai_server.client import EngineClient
from kernel_openai_server.generation import make_router as generation_routes
from kernel_openai_server.grammar import Grammar
from kernel_openai_server.operation import make_router as operation_routes
from kernel_openai_server.response_routes import make_router as response_routes
from kernel_openai_server.section import NAME, ServerSection
from kernel_openai_server.tools import Tools

KEY = "KERNEL_API_KEY"
Owned = tuple[str, APIRouter]


class Service:
    """Implements "openai/1"."""

    def __init__(self, context: BuildContext) -> None:
        self._context = context

    def app(self, engine: EngineClient) -> Application:
        """The application on an engine that takes requests. It needs no lifespan. Raises ConfigError."""
        context, section = self._context, self._context.section
        api = Api(
            engine=engine,
            section=section,
            names=section.served_model_name or (context.config.model,),
            root=context.config.model,
            tools=context.service("tools/1", Tools),
            grammar=context.service("grammar/1", Grammar),
        )
        own = [(NAME, operation_routes(api)), (NAME, generation_routes(api)), (NAME, response_routes(api))]
        routers = own + context.ask("register_routes", engine=engine)
        check_owners(routers)
        app = build(routers, section, api)
        api.renderer.warm()
        return layered(app, section, routers, context.ask("watch_http"))


def build(routers: Sequence[Owned], section: ServerSection, api: Api) -> FastAPI:
    documents = {} if section.documents else {"docs_url": None, "redoc_url": None, "openapi_url": None}
    app = FastAPI(title="kernel", version=version("kernel-core"), redirect_slashes=False, **documents)
    errors.install(app)
    for _, router in routers:
        app.include_router(router)
    openapi.install(app, api.models)
    return app


def layered(
    app: Application, section: ServerSection, routers: Sequence[Owned], observers: Sequence[tuple[str, Any]]
) -> Application:
    app = Bodies(app, section.max_body_bytes, section.body_seconds)
    keys = [*section.api_keys, *filter(None, [os.environ.get(KEY)])]
    if keys:
        app = Keys(app, keys, [route for _, router in routers for route in router.routes if is_public(route)])
    app = Heads(app)
    if section.cors_origins:
        app = CORSMiddleware(
            app, allow_origins=section.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=["x-request-id"]
        )
    return Exchanges(app, observers, section.log_requests)


def check_owners(routers: Sequence[Owned]) -> None:
    """Raises ConfigError for two routes with one path and method."""
    owners: dict[tuple[str, str], str] = {}
    for plugin, router in routers:
        for method, path in (place for route in router.routes for place in _places(route)):
            owner = owners.setdefault((method, path), plugin)
            if owner != plugin:
                raise ConfigError(f"the route {method} {path} belongs to the plugins {owner!r} and {plugin!r}: enable only one")


def _places(route: BaseRoute) -> Iterator[tuple[str, str]]:
    for method in sorted(getattr(route, "methods", None) or ()):
        yield method, getattr(route, "path", "")
