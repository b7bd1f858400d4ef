"""Routes about the server: models, tokens, health, load."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

from fastapi import APIRouter, Request
from starlette.responses import Response

from kernel_core.api import EngineDeadError
from kernel_openai_server import chat
from kernel_openai_server.api import Api
from kernel_openai_server.errors import invalid
from kernel_openai_server.fields import read
from kernel_openai_server.openapi import answers
from kernel_openai_server.protocol import objects
from kernel_openai_server.protocol.objects import json_bytes
from kernel_openai_server.protocol.requests import DetokenizeRequest, TokenizeRequest
from kernel_openai_server.rendering import template_messages


@runtime_checkable
class ReportsLoad(Protocol):
    """Engines that tell how full they are."""

    async def load(self) -> Any: ...


def public(handler: Any) -> Any:
    """Open without an API key."""
    handler.public = True
    return handler


def as_json(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")


def make_router(api: Api) -> APIRouter:
    router = APIRouter(tags=["operation"])

    @router.get("/health", **answers(None, objects.Health))
    @public
    async def health() -> Response:
        """200: the engine takes requests; 503: it does not, and why."""
        if api.engine.dead is not None:
            raise EngineDeadError(api.engine.dead)
        return as_json(objects.Health("ok"))

    @router.get("/ping", **answers(None, objects.Health))
    @public
    async def ping() -> Response:
        return await health()

    @router.get("/version", **answers(None, objects.Version))
    async def get_version() -> Response:
        return as_json(objects.Version(version("kernel-core")))

    @router.get("/load", **answers(None, objects.Load))
    async def load() -> Response:
        """How much runs and waits, and how many KV blocks are free."""
        unfinished, engine = api.answering.unfinished, api.engine
        if not isinstance(engine, ReportsLoad):
            return as_json(objects.Load(unfinished))
        found = await engine.load()
        blocks = (list(found.free_blocks), list(found.num_blocks))
        return as_json(objects.Load(unfinished, found.running, found.waiting, *blocks))

    @router.post("/reset_prefix_cache", **answers(None, None))
    async def reset_prefix_cache() -> Response:
        """Forget the KV of earlier requests."""
        await api.engine.reset_cache()
        return Response(status_code=204)

    _add_models(router, api)
    _add_tokens(router, api)
    return router


def _add_models(router: APIRouter, api: Api) -> None:
    def model(name: str) -> objects.Model:
        return objects.Model(name, "model", api.created, "kernel", api.root, api.engine.max_model_len)

    @router.get("/v1/models", **answers(None, objects.ModelList))
    async def list_models() -> Response:
        return as_json(objects.ModelList("list", [model(name) for name in api.names]))

    @router.get("/v1/models/{name:path}", **answers(None, objects.Model))
    async def get_model(name: str) -> Response:
        return as_json(model(api.served(name)))


def _add_tokens(router: APIRouter, api: Api) -> None:
    @router.post("/tokenize", **answers("TokenizeRequest", objects.Tokens))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text, or of a conversation as the model sees it."""
        body = await read(request, TokenizeRequest)
        api.served(body.model)
        ids = await _tokens(api, body)
        texts = await api.renderer.tokens(ids) if body.return_token_strs else None
        return as_json(objects.Tokens(len(ids), api.engine.max_model_len, ids, texts))

    @router.post("/detokenize", **answers("DetokenizeRequest", objects.Text))
    async def detokenize(request: Request) -> Response:
        body = await read(request, DetokenizeRequest)
        api.served(body.model)
        return as_json(objects.Text(await api.renderer.decode(body.tokens, body.skip_special_tokens)))


async def _tokens(api: Api, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise invalid("send either prompt or messages", "prompt")
    if body.prompt is not None:
        return await api.renderer.encode(body.prompt, body.add_special_tokens)
    messages, args = template_messages(body.messages or ()), dict(body.chat_template_kwargs or {})
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    turn = chat.begin(api.tools, messages, tools, None, True, args)
    messages, shown = chat.templated(turn, messages)
    return await api.renderer.chat_ids(messages, body, args, shown)
