"""Objects of answers. msgspec structs, because they are encoded once per streamed chunk; a field that is UNSET is left out."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType
from msgspec.json import Encoder

from kernel_core.api import RequestOutput

_encode = Encoder().encode


def json_bytes(value: Any) -> bytes:
    return _encode(value)


def event(value: Any) -> bytes:
    """One server-sent event. Rate: chunk."""
    return b"data: " + _encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class PromptDetails(Struct):
    cached_tokens: int


class Usage(Struct):
    """`completion_tokens` counts those of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


def usage_of(outputs: list[RequestOutput], counts_completion: bool = True) -> Usage:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(len(choice.token_ids) for output in outputs for choice in output.outputs) if counts_completion else 0
    cached = sum(output.num_cached_tokens for output in outputs)
    return Usage(prompt, completion, prompt + completion, PromptDetails(cached))


# ---- errors


class ErrorDetails(Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Error(Struct):
    error: ErrorDetails


# ---- models


class Model(Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(Struct):
    object: Literal["list"]
    data: list[Model]


# ---- completions

PromptLogprob = dict[str, dict[str, Any]]
FinishReason = Literal["stop", "length", "tool_calls", "abort", "error"]


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[PromptLogprob | None] | UnsetType = UNSET


class Completion(Struct):
    """Also the chunk of a stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType = UNSET


# ---- chat


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class Function(Struct):
    name: str
    arguments: str


class ToolCall(Struct):
    id: str
    type: Literal["function"]
    function: Function


class Message(Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct):
    index: int
    message: Message
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[PromptLogprob | None] | UnsetType = UNSET


class FunctionPiece(Struct):
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallPiece(Struct):
    index: int
    function: FunctionPiece
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class Delta(Struct):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallPiece] | UnsetType = UNSET


class ChunkChoice(Struct):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(Struct):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    system_fingerprint: str | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


# ---- tokens and operation


class Tokens(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Text(Struct):
    prompt: str


class Health(Struct):
    status: Literal["ok"]


class Version(Struct):
    version: str


class Load(Struct):
    """`unfinished`: requests of this API process; the rest is the engine's, over all of them. Blocks are per KV group."""

    unfinished: int
    running: int | None = None
    waiting: int | None = None
    free_blocks: list[int] | None = None
    num_blocks: list[int] | None = None
