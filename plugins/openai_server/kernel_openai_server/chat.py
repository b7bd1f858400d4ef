"""/v1/chat/completions: choices of a conversation, with tool calls and reasoning where a plugin reads them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET

from kernel_core.api import CompletionOutput, RequestOutput
from kernel_openai_server import tools as service
from kernel_openai_server.answering import EventWriter
from kernel_openai_server.completions import StreamUsage
from kernel_openai_server.errors import invalid
from kernel_openai_server.logprobs import LogprobWriter, prompt_logprobs
from kernel_openai_server.protocol.objects import (
    DONE,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Delta,
    Function,
    FunctionPiece,
    Message,
    ToolCall,
    ToolCallPiece,
    event,
    usage_of,
)
from kernel_openai_server.protocol.requests import ChatRequest

KIND, CHUNK = "chat.completion", "chat.completion.chunk"
PLUGIN = "tool_calling"


def check(body: ChatRequest) -> None:
    """Raises ApiError for what cannot be honoured."""
    if body.max_tokens is not None and body.max_completion_tokens is not None and body.max_tokens != body.max_completion_tokens:
        raise invalid("max_tokens and max_completion_tokens differ: send one of them", "max_tokens")
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs needs logprobs = true", "top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise invalid("logprobs of a prompt are not streamed: leave out stream or prompt_logprobs", "stream")
    if body.tool_choice is not None and not body.tools:
        raise invalid("tool_choice needs tools", "tool_choice")


def parameters(body: ChatRequest) -> dict[str, Any]:
    """Besides those of `Sampling`. Without a limit the answer may be as long as the model allows."""
    made: dict[str, Any] = {"max_tokens": body.max_completion_tokens or body.max_tokens}
    if body.logprobs:
        made["logprobs"] = body.top_logprobs or 0
    return made


def begin(
    tools: service.Tools | None,
    messages: Sequence[Mapping[str, Any]],
    given: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] | None,
    parallel: bool,
    template_args: Mapping[str, Any],
) -> service.ToolTurn | None:
    """None: nobody splits answers. Raises ApiError, RequestError."""
    if tools is not None:
        return tools.begin(messages, given, choice or ("auto" if given else "none"), parallel, template_args)
    if given:
        message = f"tools need a plugin that reads calls out of answers: enable {PLUGIN} ([plugins.{PLUGIN}])"
        raise invalid(message, "tools", "plugin_required")
    return None


def templated(
    turn: service.ToolTurn | None, messages: Sequence[Mapping[str, Any]]
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]:
    """The messages and tools that go to the chat template."""
    return (messages, None) if turn is None else (turn.template_messages, turn.template_tools)


class Split:
    """The pieces of one choice: content, reasoning and calls, as text comes."""

    __slots__ = ("_parser", "called", "ended", "logprobs", "started", "text", "tokens")

    def __init__(self, parser: service.AnswerParser | None) -> None:
        self._parser = parser
        self.text = self.tokens = self.logprobs = 0
        self.started = self.ended = self.called = False

    def advance(self, output: CompletionOutput) -> list[service.Delta]:
        """What is new in it."""
        text, ids = output.text[self.text :], output.token_ids
        new_ids = ids[self.tokens :]
        self.text, self.tokens = self.text + len(text), len(ids)
        ended = output.finish_reason is not None
        if self._parser is None:
            deltas: list[service.Delta] = [{"content": text}] if text else []
        else:
            deltas = self._parser.push(text, new_ids) if text or new_ids else []
            deltas = deltas + self._parser.finish() if ended else deltas
            self.called = self.called or any("tool_call" in delta for delta in deltas)
        self.ended = ended
        return deltas

    def finish_reason(self, output: CompletionOutput) -> str | None:
        return "tool_calls" if self.called and output.finish_reason == "stop" else output.finish_reason


@dataclass
class Spelling:
    """How reasoning is named in messages and deltas."""

    names: Sequence[str]

    def write(self, target: Message | Delta, text: str) -> None:
        for name in self.names:
            setattr(target, name, text)


@dataclass
class ChatWriter(EventWriter):
    """Implements `Writer`. `split` makes the state of a choice."""

    body: ChatRequest
    name: str
    model: str
    split: Callable[[], Split]
    logprobs: LogprobWriter
    usage: StreamUsage
    spelling: Spelling
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    splits: dict[int, Split] = field(default_factory=dict)

    # ---- stream

    def chunk(self, place: int, output: RequestOutput) -> bytes:
        usage = self.usage.of_chunk([output]) if self.usage.at_end else UNSET
        found = [self._events(one, output, usage) for one in output.outputs]
        return found[0] if len(found) == 1 else b"".join(found)

    def _events(self, one: CompletionOutput, output: RequestOutput, usage: Any) -> bytes:
        split = self.splits.get(one.index)
        events = b""
        if split is None:
            split = self.splits[one.index] = self.split()
            choice = ChunkChoice(one.index, Delta(role="assistant", content=""))
            prompt = output.prompt_token_ids if self.body.return_token_ids else UNSET
            events = event(self._chunk(choice, usage, self.fingerprint, prompt))
        if split.ended:
            return events
        pieces = [self._delta(delta) for delta in split.advance(one)]
        if split.ended or (not pieces and self._owes_tokens(one, split)):
            pieces.append(Delta())
        for number, piece in enumerate(pieces):
            choice = ChunkChoice(one.index, piece)
            if number == 0:
                self._details(choice, one, split)
            if split.ended and number == len(pieces) - 1:
                choice.finish_reason, choice.stop_reason = split.finish_reason(one), one.stop_reason
            events += event(self._chunk(choice, usage))
        return events

    def _owes_tokens(self, one: CompletionOutput, split: Split) -> bool:
        return self.body.return_token_ids and self.body.detokenize is False and len(one.token_ids) > split.logprobs

    def _chunk(self, choice: ChunkChoice, usage: Any, fingerprint: Any = UNSET, prompt: Any = UNSET) -> ChatChunk:
        return ChatChunk(self.name, CHUNK, self.created, self.model, [choice], usage, fingerprint, prompt)

    def _delta(self, delta: service.Delta) -> Delta:
        made = Delta(content=delta.get("content", UNSET))
        if "reasoning" in delta:
            self.spelling.write(made, delta["reasoning"])
        if "tool_call" in delta:
            call = delta["tool_call"]
            piece = FunctionPiece(call.get("name", UNSET), call.get("arguments", UNSET))
            begins = "id" in call
            made.tool_calls = [
                ToolCallPiece(call["index"], piece, call["id"] if begins else UNSET, "function" if begins else UNSET)
            ]
        return made

    def _details(self, choice: ChunkChoice, one: CompletionOutput, split: Split) -> None:
        """Logprobs and ids of the tokens since the last piece, which may be more than those of its text."""
        if not self.body.logprobs and not self.body.return_token_ids:
            return
        until = len(one.token_ids) if one.logprobs is None else min(len(one.token_ids), len(one.logprobs))
        ids = one.token_ids[split.logprobs : until]
        if self.body.return_token_ids:
            choice.token_ids = ids
        if one.logprobs is not None and self.body.logprobs:
            choice.logprobs = self.logprobs.chat(ids, one.logprobs[split.logprobs : until])
        split.logprobs = until

    def last(self, outputs: list[RequestOutput]) -> bytes:
        if not self.usage.at_end:
            return DONE
        return event(ChatChunk(self.name, CHUNK, self.created, self.model, [], usage_of(outputs))) + DONE

    # ---- whole

    def whole(self, outputs: list[RequestOutput]) -> ChatCompletion:
        (output,) = outputs
        choices = [self._choice(one) for one in output.outputs]
        made = ChatCompletion(self.name, KIND, self.created, self.model, choices, usage_of(outputs), self.fingerprint)
        if self.body.return_token_ids:
            made.prompt_token_ids = output.prompt_token_ids
        if self.body.prompt_logprobs is not None:
            made.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return made

    def _choice(self, one: CompletionOutput) -> ChatChoice:
        split = self.split()
        joined = join(split.advance(one))
        message = Message("assistant", joined.content)
        if joined.reasoning is not None:
            self.spelling.write(message, joined.reasoning)
        if joined.calls:
            message.tool_calls = joined.calls
        choice = ChatChoice(one.index, message, None, split.finish_reason(one), one.stop_reason)
        if self.body.logprobs and one.logprobs is not None:
            choice.logprobs = self.logprobs.chat(one.token_ids, one.logprobs)
        if self.body.return_token_ids:
            choice.token_ids = one.token_ids
        return choice


@dataclass
class Joined:
    """A whole answer. `content` is None when there are only calls."""

    content: str | None
    reasoning: str | None
    calls: list[ToolCall]


def join(deltas: Sequence[service.Delta]) -> Joined:
    content = "".join(delta.get("content", "") for delta in deltas)
    reasoning = [delta["reasoning"] for delta in deltas if "reasoning" in delta]
    calls: dict[int, ToolCall] = {}
    for delta in deltas:
        if "tool_call" in delta:
            piece = delta["tool_call"]
            call = calls.setdefault(piece["index"], ToolCall("", "function", Function("", "")))
            call.id = piece.get("id", call.id)
            call.function.name = piece.get("name", call.function.name)
            call.function.arguments += piece.get("arguments", "")
    made = [calls[index] for index in sorted(calls)]
    return Joined(None if made and not content else content, "".join(reasoning) if reasoning else None, made)
