"""/v1/responses: create, read, cancel, delete."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from kernel_core.api import RequestOutput
from kernel_openai_server import chat
from kernel_openai_server.answering import ClientGoneError, Job
from kernel_openai_server.api import Api, joined_fields
from kernel_openai_server.chat import Split
from kernel_openai_server.errors import ApiError, api_error, invalid
from kernel_openai_server.fields import read
from kernel_openai_server.grammar import format_fields
from kernel_openai_server.logprobs import LogprobWriter
from kernel_openai_server.openapi import answers
from kernel_openai_server.operation import as_json
from kernel_openai_server.protocol.requests import ChatMessage, FunctionCallPart, Templated, ToolCallPart
from kernel_openai_server.protocol.responses import DeletedResponse, InputItem, ResponseObject, ResponseRequest
from kernel_openai_server.rendering import PromptInput, template_messages
from kernel_openai_server.response_store import Stored
from kernel_openai_server.response_writer import ResponseWriter, as_messages

LOGPROBS = "message.output_text.logprobs"
RUNNING = ("queued", "in_progress")


def make_router(api: Api) -> APIRouter:
    router = APIRouter(tags=["responses"])

    @router.post("/v1/responses", **answers("ResponseRequest", ResponseObject, stream=True))
    async def create_response(request: Request) -> Response:
        api.answering.admit()
        return await create(api, await read(request, api.models.response))

    @router.get("/v1/responses/{name}", **answers(None, ResponseObject))
    async def get_response(name: str) -> Response:
        return as_json(api.store.get(name).response)

    @router.post("/v1/responses/{name}/cancel", **answers(None, ResponseObject))
    async def cancel_response(name: str) -> Response:
        """End a response that is in progress; it keeps what it has."""
        stored = api.store.get(name)
        if stored.response.status not in RUNNING:
            raise invalid(f"the response is {stored.response.status} already", code="response_not_running")
        await end(api, stored)
        return as_json(stored.response)

    @router.delete("/v1/responses/{name}", **answers(None, DeletedResponse))
    async def delete_response(name: str) -> Response:
        stored = api.store.delete(name)
        if stored.response.status in RUNNING:
            await end(api, stored)
        return as_json(DeletedResponse(name))

    return router


async def end(api: Api, stored: Stored) -> None:
    """Whoever waits for it gets what there is."""
    if stored.task is None:
        await api.engine.abort(stored.response.id)
    else:
        stored.task.cancel()
        await asyncio.wait([stored.task])
        if stored.response.status in RUNNING:  # it never began
            stored.response.status = "cancelled"


async def create(api: Api, body: ResponseRequest) -> Response:
    check(api, body)
    stored, job = await prepare(api, body)
    if body.store is not False and api.section.api_processes == 1:
        api.store.put(stored)
    if not body.background:
        return api.answering.answer(job, body.stream)
    stored.task = asyncio.ensure_future(api.answering.detached(job))
    return as_json(stored.response)


def check(api: Api, body: ResponseRequest) -> None:
    """Raises ApiError for what cannot be honoured."""
    wanted = {"store": body.store, "previous_response_id": body.previous_response_id, "background": body.background}
    param = next((name for name, value in wanted.items() if value), None)
    if param is not None and api.section.api_processes > 1:
        message = f"{param} needs plugins.openai_server.api_processes = 1: each process keeps its own responses"
        raise invalid(message, param)
    if body.background and (body.stream or body.store is False):
        raise invalid("a response in the background is stored and not streamed: read it with GET", "background")
    api.check_logprobs(top_logprobs=body.top_logprobs)


async def prepare(api: Api, body: ResponseRequest) -> tuple[Stored, Job]:
    """Raises ApiError, RequestError."""
    model = api.served(body.model)
    said = [*_previous(api, body.previous_response_id), *conversation(body.input)]
    instructions = [ChatMessage(role="system", content=body.instructions)] if body.instructions else []
    messages = template_messages([*instructions, *said])
    args = dict(body.chat_template_kwargs or {})
    if body.reasoning is not None and body.reasoning.effort is not None:
        args["reasoning_effort"] = body.reasoning.effort
    tools = [{"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"type"})} for tool in body.tools or ()]
    turn = chat.begin(api.tools, messages, tools, _choice(body), body.parallel_tool_calls, args)
    messages, shown = chat.templated(turn, messages)
    prompt = await api.renderer.chat(messages, Templated(), args, shown)
    logprobs = body.top_logprobs if body.top_logprobs is not None else 0 if LOGPROBS in (body.include or ()) else None
    own = {"max_tokens": body.max_output_tokens} | ({} if logprobs is None else {"logprobs": logprobs})
    formatted = format_fields(api.grammar, _format(body))
    given = ("the request", {**api.models.sampling(body), **own})
    fields = joined_fields(given, ("text.format", formatted), ("tools", {} if turn is None else turn.fields))
    stored = Stored(begin(body, model), said)
    writer = ResponseWriter(
        stored.response,
        Split(None if turn is None else turn.parser(prompt.token_ids)),
        None if logprobs is None else LogprobWriter(api.engine.codec, logprobs, False),
        body.stream,
    )
    return stored, _job(api, stored, prompt, fields, writer)


def _job(api: Api, stored: Stored, prompt: PromptInput, fields: Mapping[str, Any], writer: ResponseWriter) -> Job:
    def ended(outputs: list[RequestOutput], error: BaseException | None) -> None:
        response = stored.response
        if isinstance(error, ClientGoneError | asyncio.CancelledError):
            writer.cancel(outputs)
        elif error is not None:
            writer.fail(api_error(error))
        elif outputs and response.status in RUNNING:
            writer.whole(outputs)
        if response.status in ("completed", "incomplete"):
            stored.conversation = stored.conversation + as_messages(response.output)
        if api.store.holds(stored):
            api.store.put(stored)

    return Job([prompt], api.engine.params(**fields), stored.response.id, writer, ended)


def _previous(api: Api, name: str | None) -> Sequence[ChatMessage]:
    if name is None:
        return ()
    stored = api.store.get(name, "previous_response_id")
    if stored.response.status not in ("completed", "incomplete"):
        raise ApiError(400, f"the response {name!r} is {stored.response.status}", param="previous_response_id")
    return stored.conversation


def begin(body: ResponseRequest, model: str) -> ResponseObject:
    """Before anything was generated."""
    given = body.model_dump(exclude_none=True)
    names = ("instructions", "metadata", "max_output_tokens", "previous_response_id", "temperature", "top_p", "top_logprobs")
    return ResponseObject(
        id=f"resp_{secrets.token_hex(12)}",
        created_at=float(int(time.time())),
        model=model,
        status="queued" if body.background else "in_progress",
        output=[],
        parallel_tool_calls=body.parallel_tool_calls,
        tool_choice=given.get("tool_choice", "auto"),
        tools=given.get("tools", []),
        text=given.get("text", {"format": {"type": "text"}}),
        background=body.background,
        store=body.store is not False,
        reasoning=given.get("reasoning"),
        user=body.user,
        **{name: given[name] for name in names if name in given},
    )


def _choice(body: ResponseRequest) -> str | Mapping[str, Any] | None:
    choice = body.tool_choice
    if choice is not None and not body.tools:
        if choice in ("none", "auto"):  # what clients send when they have no tools
            return None
        raise invalid("tool_choice needs tools", "tool_choice")
    return choice if isinstance(choice, str | None) else {"type": "function", "function": {"name": choice.name}}


def _format(body: ResponseRequest) -> Mapping[str, Any] | None:
    """As `response_format` of a chat says it."""
    found = None if body.text is None else body.text.format
    if found is None or found.get("type") != "json_schema":
        return found
    return {"type": "json_schema", "json_schema": {name: value for name, value in found.items() if name != "type"}}


# ---- conversation


def conversation(given: str | Sequence[InputItem]) -> list[ChatMessage]:
    """Items as messages of a chat. Raises ApiError."""
    if isinstance(given, str):
        return [ChatMessage(role="user", content=given)]
    made: list[ChatMessage] = []
    for place, item in enumerate(given):
        _add(made, item, f"input.{place}")
    if not made:
        raise invalid("input must have at least one message", "input")
    return made


def _add(made: list[ChatMessage], item: InputItem, where: str) -> None:
    if item.type == "message":
        if item.role is None:
            raise invalid("a message needs a role", f"{where}.role", "missing_required_parameter")
        made.append(ChatMessage(role=item.role, content=item.content))
    elif item.type == "function_call":
        if item.call_id is None or item.name is None:
            raise invalid("a function_call needs call_id and name", where, "missing_required_parameter")
        call = ToolCallPart(id=item.call_id, function=FunctionCallPart(name=item.name, arguments=item.arguments or "{}"))
        if made and made[-1].role == "assistant":
            made[-1] = made[-1].model_copy(update={"tool_calls": [*(made[-1].tool_calls or ()), call]})
        else:
            made.append(ChatMessage(role="assistant", tool_calls=[call]))
    elif item.type == "function_call_output":
        if item.call_id is None:
            raise invalid("a function_call_output needs call_id", where, "missing_required_parameter")
        made.append(ChatMessage(role="tool", tool_call_id=item.call_id, content=item.output))
