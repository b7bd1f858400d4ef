"""What goes wrong, as the OpenAI API says it: {"error": {"message", "type", "param", "code"}} with a status code."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kernel_core.api import ConfigError, EngineDeadError, RequestError
from kernel_openai_server.protocol.objects import Error, ErrorDetails, json_bytes

INVALID, AUTHENTICATION, BUSY, SERVER = "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
BRANCH = re.compile(r"(str|int|float|bool|constrained-.*|.*\[.*|[A-Z].*)$")  # how pydantic names the branch of a union
RETRY = {"retry-after": "1"}
logger = logging.getLogger("kernel_openai_server")


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.body = Error(ErrorDetails(message, kind, param, code))

    def response(self) -> Response:
        return Response(json_bytes(self.body), self.status, self.headers, "application/json")


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, INVALID, param, code)


def api_error(error: BaseException) -> ApiError:
    """Any exception of a request."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestError | ConfigError):  # a ConfigError here: something that the request needs is not enabled
        return ApiError(400, str(error))
    if isinstance(error, EngineDeadError):
        return ApiError(503, f"the engine takes no requests now: {error}", SERVER, code="engine_dead", headers=RETRY)
    if isinstance(error, TimeoutError):
        message = "the request took longer than plugins.openai_server.request_seconds; ask for fewer tokens or raise that"
        return ApiError(504, message, SERVER, code="timeout")
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"internal error: {type(error).__name__}", SERVER, code="internal_error")


def from_validation(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"] if not BRANCH.match(str(part)))
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown field {where!r}: no enabled plugin reads it", where, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"the field {where!r} is required", where, "missing_required_parameter")
    return invalid(f"{where or 'body'}: {first['msg']}", where or None, "invalid_value")


def install(app: FastAPI) -> None:
    """Every error of every route, those of plugins included, is answered in this form."""

    async def answer(request: Request, error: Exception) -> Response:
        return api_error(error).response()

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = INVALID if error.status_code < 500 else SERVER
        message, code = str(error.detail), None
        if error.status_code == 404:
            message, code = f"there is no route {request.method} {request.url.path}", "unknown_url"
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}"
        return ApiError(error.status_code, message, kind, None, code, error.headers).response()

    async def validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:])) or None
        return invalid(f"{where or 'body'}: {first['msg']}", where, "invalid_value").response()

    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, validation)
    for kind in (ApiError, RequestError, ConfigError, EngineDeadError, TimeoutError):
        app.add_exception_handler(kind, answer)
