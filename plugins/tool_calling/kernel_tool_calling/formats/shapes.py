"""The two shapes that formats have: calls after a marker anywhere in an answer, and answers that are calls from the beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kernel_tool_calling.answer import Answer, Machine
from kernel_tool_calling.contract import AnswerParser, Message, Schema
from kernel_tool_calling.source import MalformedError, Reading, Source

Tools = Mapping[str, Schema]
Rewrite = Callable[[Sequence[Message]], Sequence[Message]]
Body = Callable[[Source, Answer, Tools, str], Reading[None]]


def unchanged(messages: Sequence[Message]) -> Sequence[Message]:
    return messages


@dataclass(frozen=True)
class MarkedFormat:
    """Implements `ToolFormat`. `body` reads what follows one of the `markers`, which it is given. `shown`: what a chat template
    that writes calls so contains; `unlike`: what it does not."""

    markers: Sequence[str]
    body: Body
    shown: Sequence[str]
    unlike: Sequence[str] = ()
    messages: Rewrite = unchanged

    def recognises(self, template: str) -> bool:
        return all(text in template for text in self.shown) and not any(text in template for text in self.unlike)

    def parser(self, tools: Tools) -> AnswerParser:
        return Machine(lambda source, answer: self._read(source, answer, tools))

    def _read(self, source: Source, answer: Answer, tools: Tools) -> Reading[None]:
        markers = tuple(self.markers)
        while marker := (yield from source.until(markers, answer.content)):
            source.mark(len(marker))
            try:
                yield from self.body(source, answer, tools, marker)
            except MalformedError:
                answer.content(source.give_back())
            source.release()


@dataclass(frozen=True)
class LeadingFormat:
    """Implements `ToolFormat`. A call begins the answer, after nothing but space and perhaps one of `introductions`."""

    introductions: Sequence[str]
    body: Body
    shown: Sequence[str]
    markers: Sequence[str] = ()
    messages: Rewrite = unchanged

    def recognises(self, template: str) -> bool:
        return any(text in template for text in self.shown)

    def parser(self, tools: Tools) -> AnswerParser:
        return Machine(lambda source, answer: self._read(source, answer, tools))

    def _read(self, source: Source, answer: Answer, tools: Tools) -> Reading[None]:
        source.mark()
        try:
            yield from source.space()
            marker = (yield from source.match(*self.introductions)) if self.introductions else ""
            yield from self.body(source, answer, tools, marker)
        except MalformedError:
            answer.content(source.give_back())
        source.release()
        yield from source.until((), answer.content)
