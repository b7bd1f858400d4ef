"""What formats and parsers are, for this plugin and for those that add one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict

Schema = Mapping[str, Any]
Message = Mapping[str, Any]
ReasoningTags = tuple[str, str]


class ToolCallDelta(TypedDict, total=False):
    """A piece of one call. `name` comes once, with the first piece, and so may `id`; without one the plugin makes it.
    `arguments` are JSON text to concatenate."""

    index: int
    id: str
    name: str
    arguments: str


class Delta(TypedDict, total=False):
    """A piece of an answer: one of the three. Concatenating the pieces gives the whole."""

    reasoning: str
    content: str
    tool_call: ToolCallDelta


class AnswerParser(Protocol):
    """Splits one answer. What it finds depends on the text only, not on how it was cut into pushes. Raises nothing: text that is
    no call is content."""

    def push(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        """The deltas that more text completes. Rate: chunk of an answer."""
        ...

    def finish(self) -> list[Delta]:
        """What was held back. Called once."""
        ...


class ToolFormat(Protocol):
    """How models write tool calls. `markers`: texts that begin a call, () where a call can only begin an answer."""

    markers: Sequence[str]

    def recognises(self, template: str) -> bool:
        """This chat template (Jinja text) writes calls so. Rate: build."""
        ...

    def messages(self, messages: Sequence[Message]) -> Sequence[Message]:
        """A conversation as the chat templates of such models take it. Arguments of calls come as objects. Rate: request."""
        ...

    def parser(self, tools: Mapping[str, Schema]) -> AnswerParser:
        """`tools`: name → JSON schema of its arguments. Rate: answer."""
        ...


class Grammar(Protocol):
    """What is used of the service "grammar/1"."""

    def response_format(self, response_format: Mapping[str, Any]) -> Mapping[str, Any]:
        """OpenAI's `response_format` → request fields. Raises RequestError for what it cannot honour. Its JSON should have one
        fixed spacing: a model that is free to choose may write space without end. Rate: request."""
        ...
