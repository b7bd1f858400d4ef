"""The OpenAPI document: bodies are described by their pydantic models, answers by their msgspec structs."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from kernel_openai_server.fields import RequestModels
from kernel_openai_server.protocol import objects
from kernel_openai_server.protocol.requests import DetokenizeRequest, TokenizeRequest
from kernel_openai_server.protocol.responses import DeletedResponse, ResponseObject

REFERENCE = "#/components/schemas/{name}"
STATUSES = {
    400: "the request is invalid; `param` names the field",
    401: "no API key, or an unknown one",
    404: "there is no such model or object",
    408: "the body did not arrive in time",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "too many requests are unfinished; see Retry-After",
    500: "it failed",
    503: "the engine takes no requests now; see Retry-After",
    504: "the request took too long",
}
ANSWERS = (objects.Completion, objects.ChatCompletion, objects.ChatChunk, objects.ModelList, objects.Model, objects.Tokens)
STRUCTS = (*ANSWERS, objects.Text, objects.Health, objects.Version, objects.Load, objects.Error, ResponseObject, DeletedResponse)


def answers(body: str | None, answer: type | None, stream: bool = False) -> dict[str, Any]:
    """Keywords of a route: how its body and its answers are described."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": _json("Error")} for status, text in STATUSES.items()
    }
    if answer is None:
        found[204] = {"description": "done"}
    else:
        content = _json(answer.__name__)
        if stream:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        found[200] = {"description": "the answer", "content": content}
    extra = {"requestBody": {"required": True, "content": _json(body)}} if body else {}
    return {"responses": found, "openapi_extra": extra, "response_model": None, "status_code": 200 if answer else 204}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": REFERENCE.format(name=name)}}}


def install(app: FastAPI, models: RequestModels) -> None:
    """Make the document when it is first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schemas = app.openapi_schema.setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_schemas(models))
        return app.openapi_schema

    app.openapi = document


def _schemas(models: RequestModels) -> dict[str, Any]:
    bodies = (models.completion, models.chat, models.response, TokenizeRequest, DetokenizeRequest)
    _, found = models_json_schema([(model, "validation") for model in bodies], ref_template="#/components/schemas/{model}")
    _, structs = msgspec.json.schema_components(STRUCTS, ref_template=REFERENCE)
    return {**found["$defs"], **structs}
