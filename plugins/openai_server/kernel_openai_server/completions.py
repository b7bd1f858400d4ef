"""/v1/completions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec import UNSET, UnsetType

from kernel_core.api import CompletionOutput, RequestOutput, TextCodec
from kernel_openai_server.answering import EventWriter
from kernel_openai_server.errors import invalid
from kernel_openai_server.logprobs import LogprobWriter, prompt_logprobs
from kernel_openai_server.protocol.objects import (
    DONE,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    event,
    usage_of,
)
from kernel_openai_server.protocol.requests import CompletionRequest, Sampling
from kernel_openai_server.rendering import PromptInput

KIND = "text_completion"


def check(body: CompletionRequest) -> None:
    """Raises ApiError for what cannot be honoured."""
    if body.suffix:
        raise invalid("suffix is not supported: models here do not infill; leave it out", "suffix", "unsupported_parameter")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise invalid("best_of is not supported: choices are not ranked; ask for n", "best_of", "unsupported_parameter")
    if body.max_tokens == 0 and (not body.echo or body.stream):
        raise invalid("max_tokens = 0 needs echo, and no stream: there would be nothing to send", "max_tokens")
    if body.stream and (body.echo or body.prompt_logprobs is not None) and (body.logprobs is not None or not body.echo):
        raise invalid("logprobs of a prompt are not streamed: leave out stream, or echo and prompt_logprobs", "stream")


def parameters(body: CompletionRequest) -> dict[str, Any]:
    """Besides those of `Sampling`. A prompt that is only echoed needs one step, whose token is dropped."""
    made: dict[str, Any] = {} if body.max_tokens is None else {"max_tokens": max(body.max_tokens, 1)}
    if body.logprobs is not None:
        made["logprobs"] = body.logprobs
        if body.echo:
            made["prompt_logprobs"] = body.logprobs
    return made


@dataclass(slots=True)
class Sent:
    """How much of a choice is out."""

    text: int = 0
    tokens: int = 0
    logprobs: int = 0
    offset: int = 0
    ended: bool = False


@dataclass
class StreamUsage:
    """When a stream tells the usage."""

    at_end: bool
    always: bool

    @classmethod
    def of(cls, body: Sampling, always_at_end: bool) -> StreamUsage:
        """Raises ApiError."""
        options = body.stream_options
        if options is not None and not body.stream:
            raise invalid("stream_options needs stream = true", "stream_options")
        at_end = always_at_end or (options is not None and options.include_usage)
        if options is not None and options.continuous_usage_stats and not at_end:
            raise invalid("continuous_usage_stats needs include_usage = true", "stream_options.continuous_usage_stats")
        return cls(at_end, options is not None and options.continuous_usage_stats)

    def of_chunk(self, outputs: Sequence[RequestOutput]) -> Usage | UnsetType | None:
        return usage_of(list(outputs)) if self.always else None if self.at_end else UNSET


@dataclass
class CompletionWriter(EventWriter):
    """Implements `Writer`."""

    body: CompletionRequest
    name: str
    model: str
    prompts: Sequence[PromptInput]
    logprobs: LogprobWriter
    codec: TextCodec | None
    usage: StreamUsage
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    seen: dict[int, RequestOutput] = field(default_factory=dict)
    sent: dict[int, Sent] = field(default_factory=dict)

    def _echo(self, place: int) -> str:
        if not self.body.echo:
            return ""
        prompt = self.prompts[place]
        if prompt.text is not None:
            return prompt.text
        return "" if self.codec is None else self.codec.decode(prompt.token_ids, False)

    # ---- stream

    def chunk(self, place: int, output: RequestOutput) -> bytes:
        self.seen[place] = output
        choices = [
            c for one in output.outputs if (c := self._piece(place * len(output.outputs) + one.index, place, one)) is not None
        ]
        if not choices:
            return b""
        usage = self.usage.of_chunk(list(self.seen.values())) if self.usage.at_end else UNSET
        return event(Completion(self.name, KIND, self.created, self.model, choices, usage))

    def _piece(self, index: int, place: int, output: CompletionOutput) -> CompletionChoice | None:
        sent = self.sent.get(index)
        echo = ""
        if sent is None:
            sent = self.sent[index] = Sent()
            echo = self._echo(place)
        if sent.ended:
            return None
        text, ids = output.text, output.token_ids
        ended = output.finish_reason is not None
        if len(text) == sent.text and not ended and not echo and not (self.body.return_token_ids and len(ids) > sent.tokens):
            return None
        choice = CompletionChoice(index, echo + text[sent.text :], None, output.finish_reason)
        if output.logprobs is not None:
            choice.logprobs = self._new_logprobs(sent, output)
        if self.body.return_token_ids:
            choice.token_ids = ids[sent.tokens :]
            if sent.tokens == 0:
                choice.prompt_token_ids = self.prompts[place].token_ids
        if ended:
            choice.stop_reason = output.stop_reason
        sent.text, sent.tokens, sent.ended = len(text), len(ids), ended
        return choice

    def _new_logprobs(self, sent: Sent, output: CompletionOutput) -> CompletionLogprobs:
        entries = output.logprobs or []
        until = min(len(entries), len(output.token_ids))
        found, sent.offset = self.logprobs.completion(
            output.token_ids[sent.logprobs : until], entries[sent.logprobs : until], sent.offset
        )
        sent.logprobs = until
        return found

    def last(self, outputs: list[RequestOutput]) -> bytes:
        if not self.usage.at_end:
            return DONE
        return event(Completion(self.name, KIND, self.created, self.model, [], usage_of(outputs))) + DONE

    # ---- whole

    def whole(self, outputs: list[RequestOutput]) -> Completion:
        choices = [
            self._choice(place * len(output.outputs) + one.index, place, output, one)
            for place, output in enumerate(outputs)
            for one in output.outputs
        ]
        usage = usage_of(outputs, self.body.max_tokens != 0)
        return Completion(self.name, KIND, self.created, self.model, choices, usage, self.fingerprint)

    def _choice(self, index: int, place: int, output: RequestOutput, one: CompletionOutput) -> CompletionChoice:
        body, only_echo = self.body, self.body.max_tokens == 0
        text, ids = ("", []) if only_echo else (one.text, one.token_ids)
        choice = CompletionChoice(index, self._echo(place) + text, None, "length" if only_echo else one.finish_reason)
        choice.stop_reason = None if only_echo else one.stop_reason
        if body.logprobs is not None:
            before = list(zip(output.prompt_token_ids, output.prompt_logprobs or [])) if body.echo else []
            pairs = before + list(zip(ids, one.logprobs or []))
            choice.logprobs, _ = self.logprobs.completion([t for t, _ in pairs], [e for _, e in pairs], 0)
        if body.return_token_ids:
            choice.token_ids, choice.prompt_token_ids = ids, output.prompt_token_ids
        if body.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(output.prompt_logprobs)
        return choice
