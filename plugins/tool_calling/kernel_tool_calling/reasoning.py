"""Reasoning in front of an answer: split off, and the rest handed to the parser of calls."""

from __future__ import annotations

from collections.abc import Sequence

from kernel_tool_calling.answer import Answer, Machine
from kernel_tool_calling.contract import AnswerParser, Delta, ReasoningTags
from kernel_tool_calling.source import Reading, Source

TAGS: dict[str, ReasoningTags] = {
    "think": ("<think>", "</think>"),
    "think_brackets": ("[THINK]", "[/THINK]"),
    "thinking": ("<thinking>", "</thinking>"),
    "seed_think": ("<seed:think>", "</seed:think>"),
}


class Split:
    """Implements `AnswerParser`: reasoning first, then what `inner` makes of the rest. `opened`: the prompt ends within
    reasoning. `stops`: texts that end it without its closing tag, as the marker of a call does."""

    def __init__(self, tags: ReasoningTags, opened: bool, stops: Sequence[str], inner: AnswerParser) -> None:
        self._tags, self._opened, self._stops, self._inner = tags, opened, tuple(stops), inner
        self._rest: list[str] = []
        self._machine = Machine(self._read)

    def _read(self, source: Source, answer: Answer) -> Reading[None]:
        opening, closing = self._tags
        source.mark()
        yield from source.space()
        found = yield from source.match(opening)
        if found or self._opened:
            source.release()
            yield from self._reasoning(source, answer, closing)
            yield from source.space()
        else:
            self._rest.append(source.give_back())
        yield from source.until((), self._rest.append)

    def _reasoning(self, source: Source, answer: Answer, closing: str) -> Reading[None]:
        held = ""

        def trimmed(text: str) -> None:
            nonlocal held
            text = held + text
            whole = text.rstrip()
            held = text[len(whole) :]
            if whole:
                answer.reasoning(whole)

        yield from source.space()
        found = yield from source.until((closing, *self._stops), trimmed)
        if found in self._stops:
            self._rest.append(found)

    def push(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        deltas = self._machine.push(text, token_ids)
        rest = "".join(self._rest)
        self._rest.clear()
        return deltas + self._inner.push(rest, token_ids) if rest or not text else deltas

    def finish(self) -> list[Delta]:
        deltas = self._machine.finish()
        rest = "".join(self._rest)
        self._rest.clear()
        return deltas + (self._inner.push(rest, ()) if rest else []) + self._inner.finish()
