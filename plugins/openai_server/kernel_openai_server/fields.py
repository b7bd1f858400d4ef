"""Models of request bodies with the fields that plugins registered, and the sampling parameters of a body."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import Request
from pydantic import BaseModel, Field, ValidationError, create_model

from kernel_core.api import PluginError
from kernel_openai_server.errors import ApiError, from_validation, invalid
from kernel_openai_server.protocol.requests import PARAMETERS, ChatRequest, CompletionRequest
from kernel_openai_server.protocol.responses import ResponseRequest

M = TypeVar("M", bound=BaseModel)
BODIES = (CompletionRequest, ChatRequest, ResponseRequest)


class RequestModels:
    """Made once, when the application is. `registered`: the request fields of each plugin."""

    def __init__(self, registered: Mapping[str, type[BaseModel]]) -> None:
        self._added = {name: info for model in registered.values() for name, info in model.model_fields.items()}
        for plugin, model in registered.items():
            taken = sorted(set(model.model_fields) & set().union(*(api.model_fields for api in BODIES)))
            if taken:
                raise PluginError(
                    f"the plugin {plugin!r} registers the request field {taken[0]!r}, which the HTTP API has itself"
                )
        self.completion = self.extended(CompletionRequest)
        self.chat = self.extended(ChatRequest)
        self.response = self.extended(ResponseRequest)

    def extended(self, model: type[M]) -> type[M]:
        """The same model with the plugins' fields, all of them optional; their own models check the values again."""
        added: dict[str, Any] = {}
        for name, info in self._added.items():
            annotation: Any = info.annotation
            for constraint in info.metadata:
                annotation = Annotated[annotation, constraint]
            added[name] = (annotation | None, Field(None, description=info.description or "of a plugin"))
        return create_model(model.__name__, __base__=model, __doc__=model.__doc__, **added)

    def sampling(self, body: BaseModel) -> dict[str, Any]:
        """Parameters that the body sets, the plugins' included."""
        given = body.model_fields_set
        return {name: getattr(body, name) for name in (*PARAMETERS, *self._added) if name in given}


async def read(request: Request, model: type[M]) -> M:
    """The body. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {kind or 'missing'!r}: send JSON with 'Content-Type: application/json'")
    data = await request.body()
    try:
        given = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}", code="invalid_json") from error
    return validated(model, given)


def validated(model: type[M], given: Any) -> M:
    if not isinstance(given, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    try:
        return model.model_validate(given)
    except ValidationError as error:
        raise _hinted(from_validation(error), model) from None


def _hinted(error: ApiError, model: type[BaseModel]) -> ApiError:
    """An unknown field that looks like a known one."""
    details = error.body.error
    if details.code == "unknown_parameter" and details.param is not None:
        near = difflib.get_close_matches(details.param, model.model_fields, 1)
        details.message += f"; did you mean {near[0]!r}?" if near else ""
    return error
