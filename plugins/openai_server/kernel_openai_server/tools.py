"""What the server uses of the service "tools/1": tool calls and reasoning out of a model's text. Without a provider, requests
with tools are refused and no reasoning is split off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypedDict


class ToolCallDelta(TypedDict, total=False):
    """A piece of one tool call. `id` and `name` come once, with the first piece; `arguments` are JSON text to concatenate."""

    index: int
    id: str
    name: str
    arguments: str


class Delta(TypedDict, total=False):
    """A piece of an answer. Concatenating the pieces of a choice gives the whole."""

    reasoning: str
    content: str
    tool_call: ToolCallDelta


class AnswerParser(Protocol):
    """Splits one choice. Rate: once per chunk of that choice."""

    def push(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        """The deltas that more text (and its tokens) completes; [] while it is undecided."""
        ...

    def finish(self) -> list[Delta]:
        """What was held back. Called once, after the last push."""
        ...


class ToolTurn(Protocol):
    """One request. `template_messages` and `template_tools` (None: nothing) go to the chat template as `messages` and `tools`;
    `fields` are sampling fields to add."""

    @property
    def template_messages(self) -> Sequence[Mapping[str, Any]]: ...

    @property
    def template_tools(self) -> Sequence[Mapping[str, Any]] | None: ...

    @property
    def fields(self) -> Mapping[str, Any]: ...

    def parser(self, prompt_ids: Sequence[int]) -> AnswerParser:
        """A parser for one choice. `prompt_ids`: the rendered prompt, which may already have opened the reasoning."""
        ...


class Tools(Protocol):
    """The service "tools/1"."""

    def begin(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any],
        parallel: bool,
        template_args: Mapping[str, Any],
    ) -> ToolTurn:
        """Check tools and choice of a chat. Raises RequestError. Called for every chat, with tools=() when it has none."""
        ...
