"""Bodies of requests. `null` is the same as leaving a field out; an unknown field is an error. Fields that plugins registered are
added by `fields.RequestModels`. Rate: request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

Integer = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Token = Annotated[int, Strict(), Field(ge=0, lt=2**31)]
IGNORED = "ignored: it changes nothing here"


class Body(BaseModel):
    """Base of all bodies."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_null(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class StreamOptions(Body):
    include_usage: Flag = Field(False, description="a last chunk without choices that has the usage")
    continuous_usage_stats: Flag = Field(False, description="usage so far in every chunk; needs include_usage")
    include_obfuscation: Flag = Field(False, description=IGNORED)


class Ignored(Body):
    """What OpenAI defines and a server of one model has no use for."""

    user: str | None = Field(None, description=IGNORED)
    metadata: dict[str, Any] | None = Field(None, description=IGNORED)
    service_tier: str | None = Field(None, description=IGNORED)
    safety_identifier: str | None = Field(None, description=IGNORED)
    prompt_cache_key: str | None = Field(None, description=IGNORED)
    prompt_cache_retention: str | None = Field(None, description=IGNORED)


class Sampling(Ignored):
    """What /v1/completions and /v1/chat/completions share. Left out: the model's defaults."""

    model: str | None = Field(None, description="one of /v1/models; left out: the served one")
    stream: Flag = Field(False, description="server-sent events")
    stream_options: StreamOptions | None = None
    n: Integer | None = Field(None, ge=1, description="choices for each prompt")
    temperature: Number | None = Field(None, ge=0, le=2, description="0: greedy")
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: Integer | None = Field(None, ge=-1, description="0 or -1: off")
    min_p: Number | None = Field(None, ge=0, le=1)
    seed: Integer | None = Field(None, ge=-(2**63), lt=2**64, description="the same seed gives the same answer")
    stop: str | list[str] | None = Field(None, description="the answer ends before any of these")
    stop_token_ids: list[Token] | None = None
    ignore_eos: Flag | None = Field(None, description="go on after the model's end token")
    include_stop_str_in_output: Flag | None = None
    skip_special_tokens: Flag | None = None
    detokenize: Flag | None = Field(None, description="false: no text, only token ids (return_token_ids)")
    prompt_logprobs: Integer | None = Field(None, ge=-1, description="alternatives for each prompt token; not in streams")
    priority: Integer | None = Field(None, ge=-(2**31), lt=2**31, description="lower is sooner; needs a policy that reads it")
    max_drafts: Integer | None = Field(None, ge=0, description="most drafts of a drafter in a step; 0: none")
    truncate_prompt_tokens: Integer | None = Field(
        None, ge=-1, description="keep only the last so many tokens of the prompt; -1: what fits"
    )
    response_format: dict[str, Any] | None = Field(
        None, description="text, json_object, json_schema, ...: needs a plugin with grammars for all but text"
    )
    return_token_ids: Flag = Field(False, description="token_ids of the answer and prompt_token_ids")
    return_tokens_as_token_ids: Flag = Field(False, description='tokens of logprobs as "token_id:ID"')


#: fields of `Sampling` that are sampling parameters of the engine, by the same name
PARAMETERS = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "priority"),
    *("include_stop_str_in_output", "skip_special_tokens", "detokenize", "prompt_logprobs", "max_drafts"),
)


class CompletionRequest(Sampling):
    """POST /v1/completions"""

    prompt: str | list[str] | list[Token] | list[list[Token]] = Field(description="text, token ids, or several of either")
    max_tokens: Integer | None = Field(None, ge=0, description="16 unless the model says otherwise; 0 needs echo")
    logprobs: Integer | None = Field(None, ge=-1, description="alternatives for each token")
    echo: Flag = Field(False, description="the prompt before the answer")
    best_of: Integer | None = Field(None, ge=1, description="only if it equals n: choices are not ranked")
    suffix: str | None = Field(None, description="refused: no infilling")
    add_special_tokens: Flag = Field(True, description="such as a begin token, before a prompt of text")


class FunctionCallPart(Body):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCallPart(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCallPart
    index: Integer | None = None


class ContentPart(Body):
    """Text; other kinds are refused by name."""

    model_config = ConfigDict(extra="allow")
    type: str
    text: str | None = None


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCallPart] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = Field(None, description=IGNORED)
    annotations: list[Any] | None = Field(None, description=IGNORED)


class FunctionTool(Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Flag | None = None


class Tool(Body):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class Templated(Body):
    """How a conversation becomes a prompt."""

    add_generation_prompt: Flag = Field(True, description="end the prompt where the assistant speaks")
    continue_final_message: Flag = Field(False, description="go on with the last message instead of answering it")
    chat_template: str | None = Field(None, description="Jinja; refused unless the server allows it")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables for the template")


class ChatRequest(Sampling, Templated):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: Integer | None = Field(None, ge=1, description="what fits, if left out")
    max_completion_tokens: Integer | None = Field(None, ge=1, description="the same as max_tokens")
    logprobs: Flag = False
    top_logprobs: Integer | None = Field(None, ge=0, description="alternatives for each token; needs logprobs")
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: Flag = True
    reasoning_effort: str | None = Field(None, description="given to the chat template")
    store: Flag | None = Field(None, description=IGNORED)
    modalities: list[Literal["text"]] | None = Field(None, description="text only")
    prediction: dict[str, Any] | None = Field(None, description=IGNORED)
    verbosity: str | None = Field(None, description=IGNORED)


class TokenizeRequest(Templated):
    """POST /tokenize: `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: Flag = Field(True, description="for `prompt`; a chat template brings its own")
    return_token_strs: Flag = False


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: str | None = None
    tokens: list[Token]
    skip_special_tokens: Flag = False
