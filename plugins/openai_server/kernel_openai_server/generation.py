"""Routes that generate: /v1/completions and /v1/chat/completions."""

from __future__ import annotations

import secrets

from fastapi import APIRouter, Request
from starlette.responses import Response

from kernel_openai_server import chat, completions
from kernel_openai_server.answering import Job
from kernel_openai_server.api import Api, joined_fields
from kernel_openai_server.chat import ChatWriter, Spelling, Split
from kernel_openai_server.completions import CompletionWriter, StreamUsage
from kernel_openai_server.fields import read
from kernel_openai_server.grammar import format_fields
from kernel_openai_server.openapi import answers
from kernel_openai_server.protocol import objects
from kernel_openai_server.protocol.requests import ChatRequest, CompletionRequest
from kernel_openai_server.rendering import template_messages


def make_router(api: Api) -> APIRouter:
    router = APIRouter(tags=["generation"])

    @router.post("/v1/completions", **answers("CompletionRequest", objects.Completion, stream=True))
    async def create_completion(request: Request) -> Response:
        api.answering.admit()
        return await completion(api, await read(request, api.models.completion))

    @router.post("/v1/chat/completions", **answers("ChatRequest", objects.ChatCompletion, stream=True))
    async def create_chat_completion(request: Request) -> Response:
        api.answering.admit()
        return await chat_completion(api, await read(request, api.models.chat))

    return router


async def completion(api: Api, body: CompletionRequest) -> Response:
    completions.check(body)
    model = api.served(body.model)
    prompts = await api.renderer.prompts(body.prompt, body.add_special_tokens, body.truncate_prompt_tokens)
    api.check(body, len(prompts), logprobs=body.logprobs)
    given = ("the request", {**api.models.sampling(body), **completions.parameters(body)})
    fields = joined_fields(given, ("response_format", format_fields(api.grammar, body.response_format)))
    name = f"cmpl-{secrets.token_hex(12)}"
    writer = CompletionWriter(
        body=body,
        name=name,
        model=model,
        prompts=prompts,
        logprobs=api.logprob_writer(body, body.logprobs),
        codec=api.engine.codec,
        usage=StreamUsage.of(body, api.section.reports_usage),
        fingerprint=api.fingerprint,
    )
    return api.answering.answer(Job(prompts, api.engine.params(**fields), name, writer), body.stream)


async def chat_completion(api: Api, body: ChatRequest) -> Response:
    chat.check(body)
    model = api.served(body.model)
    api.check(body, top_logprobs=body.top_logprobs)
    messages = template_messages(body.messages)
    template_args = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        template_args["reasoning_effort"] = body.reasoning_effort
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    choice = body.tool_choice if isinstance(body.tool_choice, str | None) else body.tool_choice.model_dump()
    turn = chat.begin(api.tools, messages, tools, choice, body.parallel_tool_calls, template_args)
    messages, shown = chat.templated(turn, messages)
    prompt = await api.renderer.chat(messages, body, template_args, shown, body.truncate_prompt_tokens)
    given = ("the request", {**api.models.sampling(body), **chat.parameters(body)})
    formatted = ("response_format", format_fields(api.grammar, body.response_format))
    fields = joined_fields(given, formatted, ("tools", {} if turn is None else turn.fields))
    name = f"chatcmpl-{secrets.token_hex(12)}"
    writer = ChatWriter(
        body=body,
        name=name,
        model=model,
        split=lambda: Split(None if turn is None else turn.parser(prompt.token_ids)),
        logprobs=api.logprob_writer(body, body.top_logprobs),
        usage=StreamUsage.of(body, api.section.reports_usage),
        spelling=Spelling(api.section.reasoning_spelling),
        fingerprint=api.fingerprint,
    )
    return api.answering.answer(Job([prompt], api.engine.params(**fields), name, writer), body.stream)
