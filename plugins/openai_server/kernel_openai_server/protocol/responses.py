"""/v1/responses: its body, and the objects of its answers and events."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType
from pydantic import ConfigDict, Field

from kernel_openai_server.protocol.requests import (
    IGNORED,
    Body,
    ContentPart,
    Flag,
    Ignored,
    Integer,
    Number,
    Token,
)

# ---- body


class InputItem(Body):
    """A message, a call of a function or its result; what an answer's items carry besides is ignored."""

    model_config = ConfigDict(extra="ignore")
    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class ResponseTool(Body):
    """A function; other kinds of tools run at OpenAI and are refused."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class NamedResponseTool(Body):
    type: Literal["function"]
    name: str


class TextOptions(Body):
    format: dict[str, Any] | None = Field(None, description="text, json_object, json_schema: as response_format of chats")
    verbosity: str | None = Field(None, description=IGNORED)


class ReasoningOptions(Body):
    effort: str | None = Field(None, description="given to the chat template as reasoning_effort")
    summary: str | None = Field(None, description=IGNORED)
    generate_summary: str | None = Field(None, description=IGNORED)


class ResponseRequest(Ignored):
    """POST /v1/responses"""

    input: str | list[InputItem]
    model: str | None = Field(None, description="one of /v1/models; left out: the served one")
    instructions: str | None = Field(None, description="a system message for this response only")
    previous_response_id: str | None = Field(None, description="go on where that one ended")
    stream: Flag = False
    stream_options: dict[str, Any] | None = Field(None, description=IGNORED)
    store: Flag | None = Field(None, description="keep it for GET and previous_response_id (true)")
    background: Flag = Field(False, description="answer at once, and go on; read it with GET")
    max_output_tokens: Integer | None = Field(None, ge=1)
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1)
    min_p: Number | None = Field(None, ge=0, le=1)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stop_token_ids: list[Token] | None = None
    ignore_eos: Flag | None = None
    skip_special_tokens: Flag | None = None
    priority: Integer | None = Field(None, ge=-(2**31), lt=2**31)
    max_drafts: Integer | None = Field(None, ge=0, description="most drafts of a drafter in a step; 0: none")
    top_logprobs: Integer | None = Field(None, ge=0, description="alternatives for each token; also include")
    include: list[str] | None = Field(None, description='"message.output_text.logprobs"; others are ignored')
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: Flag = True
    max_tool_calls: Integer | None = Field(None, description=IGNORED)
    truncation: Literal["disabled"] = Field("disabled", description="a conversation that is too long is refused")
    chat_template_kwargs: dict[str, Any] | None = None


# ---- answer

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(Struct, tag="output_text", tag_field="type"):
    text: str
    annotations: list[Any] = []
    logprobs: list[Any] = []


class OutputMessage(Struct, tag="message", tag_field="type"):
    id: str
    status: str
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class ReasoningText(Struct, tag="reasoning_text", tag_field="type"):
    text: str


class ReasoningItem(Struct, tag="reasoning", tag_field="type"):
    id: str
    status: str
    content: list[ReasoningText]
    summary: list[Any] = []


class FunctionCallItem(Struct, tag="function_call", tag_field="type"):
    id: str
    call_id: str
    name: str
    arguments: str
    status: str


Item = OutputMessage | ReasoningItem | FunctionCallItem


class InputDetails(Struct):
    cached_tokens: int


class OutputDetails(Struct):
    reasoning_tokens: int = 0


class ResponseUsage(Struct):
    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: InputDetails
    output_tokens_details: OutputDetails


class Incomplete(Struct):
    reason: str


class ResponseError(Struct):
    code: str
    message: str


class ResponseObject(Struct, kw_only=True):
    id: str
    created_at: float
    model: str
    status: Status
    output: list[Item]
    parallel_tool_calls: bool
    tool_choice: Any
    tools: list[Any]
    text: Any
    background: bool
    store: bool
    object: Literal["response"] = "response"
    error: ResponseError | None = None
    incomplete_details: Incomplete | None = None
    instructions: str | None = None
    metadata: dict[str, Any] = {}
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    reasoning: Any = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None


class DeletedResponse(Struct):
    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class Event(Struct, kw_only=True):
    """Of a stream; fields that an event of this type does not have are left out."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: Item | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[Any] | UnsetType = UNSET
    code: str | UnsetType = UNSET
    message: str | UnsetType = UNSET
    param: UnsetType | None = UNSET
