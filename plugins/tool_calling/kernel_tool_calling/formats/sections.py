"""Formats with a section of calls, each with a header before its arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernel_tool_calling.answer import Answer, Call
from kernel_tool_calling.contract import Message
from kernel_tool_calling.formats.shapes import MarkedFormat, Tools
from kernel_tool_calling.json_text import arguments
from kernel_tool_calling.source import MalformedError, Reading, Source

KIMI_ID = re.compile(r"(?:functions\.)?([\w.\-]+):\d+")


@dataclass(frozen=True)
class Section:
    """The marks of a section. `header` reads a call up to its arguments, `tail` is what may stand after them."""

    end: str
    call: str
    call_end: str
    header: Callable[[Source, Call], Reading[None]]
    tail: str = ""

    def read(self, source: Source, answer: Answer, tools: Tools, marker: str) -> Reading[None]:
        """Calls until the section ends."""
        yield from source.space()
        found = yield from source.expect(self.call, self.end)
        while found != self.end:
            call = answer.call()
            yield from self.header(source, call)
            yield from arguments(source, call)
            call.close()
            source.mark()
            yield from source.space()
            if self.tail and (yield from source.closing(self.tail)):
                yield from source.space()
            if not (yield from source.closing(self.call_end)):
                raise MalformedError
            source.mark()
            yield from source.space()
            found = yield from source.closing(self.call, self.end)
            if not found:
                raise MalformedError


def deepseek_header(source: Source, call: Call) -> Reading[None]:
    """V3: function<sep>name, and the arguments in a block of code; V3.1: name<sep>, and the arguments."""
    call.name = (yield from source.before("<｜tool▁sep｜>")).strip()
    yield from source.space()
    if (yield from source.peek()) != "{":
        call.name = (yield from source.before("\n")).strip()
        yield from source.match("```json")
        yield from source.space()


def text_arguments(messages: Sequence[Message]) -> Sequence[Message]:
    """Arguments as JSON text, which these templates put together with other text."""

    def text(call: Message) -> Message:
        given = call["function"].get("arguments")
        written = given if isinstance(given, str) else json.dumps(given or {}, ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": written}}

    return [{**m, "tool_calls": [text(call) for call in m["tool_calls"]]} if m.get("tool_calls") else m for m in messages]


def kimi_header(source: Source, call: Call) -> Reading[None]:
    """functions.name:number, which is also the id of the call."""
    call.id = (yield from source.before("<|tool_call_argument_begin|>")).strip()
    found = KIMI_ID.fullmatch(call.id)
    if found is None:
        raise MalformedError
    call.name = found[1]
    yield from source.space()


_DEEPSEEK = Section("<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", deepseek_header, "```")
_KIMI = Section("<|tool_calls_section_end|>", "<|tool_call_begin|>", "<|tool_call_end|>", kimi_header)
DEEPSEEK_V3 = MarkedFormat(("<｜tool▁calls▁begin｜>",), _DEEPSEEK.read, ("<｜tool▁calls▁begin｜>",), messages=text_arguments)
KIMI_K2 = MarkedFormat(("<|tool_calls_section_begin|>",), _KIMI.read, ("<|tool_calls_section_begin|>",))
