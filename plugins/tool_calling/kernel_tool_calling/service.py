"""The service "tools/1": one chat request's tools, from its checks to the parser of its answers."""

from __future__ import annotations

import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernel_core.api import BuildContext, RequestError, TextCodec
from kernel_tool_calling.answer import Machine
from kernel_tool_calling.checks import check_results, chosen_tools, tool_schemas
from kernel_tool_calling.contract import AnswerParser, Delta, Grammar, Message, ReasoningTags, Schema, ToolFormat
from kernel_tool_calling.detection import chat_template, choose_format, choose_reasoning
from kernel_tool_calling.formats import FORMATS, JSON_LIST
from kernel_tool_calling.reasoning import TAGS, Split
from kernel_tool_calling.source import Reading

ALPHABET = string.ascii_letters + string.digits
ID_LENGTH = 9  # what the strictest chat templates take
MOST_FORCED = 16  # calls in one forced answer: a model that has nothing to call repeats itself
TAIL = 16  # tokens at the end of a prompt in which an opening tag is looked for


def make_tools(context: BuildContext) -> Tools:
    """Raises ConfigError for names of parsers that do not exist."""
    added: dict[str, ToolFormat] = {}
    tags: dict[str, ReasoningTags] = {}
    for _, formats in context.ask("register_tool_formats"):
        added.update(formats or {})
    for _, more in context.ask("register_reasoning_tags"):
        tags.update(more or {})
    template = chat_template(context.model)
    return Tools(
        codec=context.service("text/1"),
        grammar=context.service("grammar/1", Grammar),
        form=choose_format(context.section.parser, {**added, **{k: v for k, v in FORMATS.items() if k not in added}}, template),
        tags=choose_reasoning(context.section.reasoning_parser, {**TAGS, **tags}, template),
    )


def new_id() -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(ID_LENGTH))


@dataclass
class Tools:
    """The provider of "tools/1". One per face process. `form` None: it is not known how the model writes calls; `tags` None: it
    marks no reasoning."""

    codec: TextCodec
    grammar: Grammar | None
    form: ToolFormat | None
    tags: ReasoningTags | None
    _special: dict[str, bool] = field(default_factory=dict)

    def begin(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        tool_choice: str | Mapping[str, Any],
        parallel: bool,
        template_args: Mapping[str, Any],
    ) -> Turn:
        """Check tools, choice and results of a chat. Raises RequestError. Rate: request, with tools=() when it has none."""
        check_results(messages)
        schemas = tool_schemas(tools)
        forced = chosen_tools(tool_choice, schemas)
        if self.form is not None:
            messages = self.form.messages(messages)
        if not schemas or tool_choice == "none":
            return self._marked(Turn(self, messages, {}, None, parallel))
        if forced is None:
            return self._marked(Turn(self, messages, schemas, self._form(), parallel, template_tools=tools))
        fields = self._forcing(forced, tool_choice, parallel)
        return Turn(self, messages, schemas, JSON_LIST, parallel, forced=True, fields=fields, template_tools=tools)

    def _marked(self, turn: Turn) -> Turn:
        """Marks that are special tokens must be in the text."""
        marks = [*(turn.form.markers if turn.form is not None else ()), *(self.tags or ())]
        if any(self.is_special(mark) for mark in marks):
            turn.fields = {"skip_special_tokens": False}
        return turn

    def _form(self) -> ToolFormat:
        if self.form is None:
            raise RequestError(
                "it is not known how this model writes tool calls, because its chat template shows none of the known formats:"
                ' set plugins.tool_calling.parser, or send tool_choice = "required" where guided_decoding is enabled'
            )
        return self.form

    def _forcing(self, forced: Mapping[str, Schema], choice: str | Mapping[str, Any], parallel: bool) -> Mapping[str, Any]:
        if self.grammar is None:
            shown = choice if isinstance(choice, str) else "a named function"
            raise RequestError(
                f"tool_choice = {shown} needs a grammar: enable guided_decoding ([plugins.guided_decoding]), or send"
                ' tool_choice = "auto"'
            )
        several = parallel and choice == "required"
        schema = calls_schema(forced, several)
        return self.grammar.response_format(
            {"type": "json_schema", "json_schema": {"name": "tool_calls", "schema": schema, "strict": True}}
        )

    def is_special(self, marker: str) -> bool:
        """Its tokens are not shown when special tokens are skipped."""
        if marker not in self._special:
            ids = self.codec.encode(marker, add_special_tokens=False)
            self._special[marker] = marker not in self.codec.decode(ids, skip_special_tokens=True)
        return self._special[marker]

    def opened(self, prompt_ids: Sequence[int]) -> bool:
        """The prompt ends with the tag that opens reasoning."""
        if self.tags is None:
            return False
        tail = self.codec.decode(list(prompt_ids[-TAIL:]), skip_special_tokens=False)
        return tail.rstrip().endswith(self.tags[0])


def calls_schema(tools: Mapping[str, Schema], several: bool) -> dict[str, Any]:
    """The schema of a list of calls of these tools."""
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": dict(schema)},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for name, schema in tools.items()
    ]
    items = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {"type": "array", "items": items, "minItems": 1, "maxItems": MOST_FORCED if several else 1}


@dataclass
class Turn:
    """One request. `template_messages` and `template_tools` go to the chat template; `fields` are sampling fields to add."""

    service: Tools
    template_messages: Sequence[Message]
    schemas: Mapping[str, Schema]
    form: ToolFormat | None
    parallel: bool
    forced: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)
    template_tools: Sequence[Mapping[str, Any]] | None = None

    def parser(self, prompt_ids: Sequence[int]) -> AnswerParser:
        """A parser for one choice. `prompt_ids`: the rendered prompt, which may already have opened the reasoning."""
        inner = self.form.parser(self.schemas) if self.form is not None else Machine(_content_only)
        tags = self.service.tags
        if tags is not None and not self.forced:
            stops = self.form.markers if self.form is not None else ()
            inner = Split(tags, self.service.opened(prompt_ids), stops, inner)
        return Numbered(inner, self.parallel)


def _content_only(source: Any, answer: Any) -> Reading[None]:
    yield from source.until((), answer.content)


class Numbered:
    """Implements `AnswerParser`: gives calls ids where they have none, and leaves out those after the first when only one is
    wanted."""

    def __init__(self, inner: AnswerParser, parallel: bool) -> None:
        self._inner, self._parallel = inner, parallel

    def push(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        return self._checked(self._inner.push(text, token_ids))

    def finish(self) -> list[Delta]:
        return self._checked(self._inner.finish())

    def _checked(self, deltas: list[Delta]) -> list[Delta]:
        kept = [delta for delta in deltas if self._parallel or delta.get("tool_call", {}).get("index", 0) == 0]
        for delta in kept:
            call = delta.get("tool_call")
            if call is not None and "name" in call:
                call.setdefault("id", new_id())
        return kept
