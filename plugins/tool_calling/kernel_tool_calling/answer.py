"""What was found in an answer, as deltas; and the machine that runs a reading."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from kernel_tool_calling.contract import Delta, ToolCallDelta
from kernel_tool_calling.source import MalformedError, Reading, Source


class Answer:
    """Collects deltas. Whitespace at either end of the content is dropped where a call or reasoning stands beside it, and kept
    otherwise."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._deltas: list[Delta] = []
        self._held, self._any, self._beside = "", False, False
        self._calls = 0

    def take(self) -> list[Delta]:
        deltas, self._deltas = self._deltas, []
        return deltas

    def content(self, text: str) -> None:
        text = self._held + text
        rest = text.rstrip()
        self._held = text[len(rest) :]
        if not rest:
            return
        if self._beside and not self._any:
            rest = rest.lstrip()
        self._any = True
        self._join("content", rest)

    def reasoning(self, text: str) -> None:
        self.beside()
        self._join("reasoning", text)

    def _join(self, kind: str, text: str) -> None:
        last = self._deltas[-1] if self._deltas else {}
        if kind in last:
            last[kind] += text  # type: ignore[literal-required]
        else:
            self._deltas.append({kind: text})  # type: ignore[misc]

    def beside(self) -> None:
        """Something else than content stands here."""
        self._beside = True

    def call(self) -> Call:
        return Call(self)

    def opened(self) -> int:
        """A call is shown from now on: its text is never given back → its index."""
        self.source.release()
        self.beside()
        self._calls += 1
        return self._calls - 1

    def piece(self, delta: ToolCallDelta) -> None:
        last = self._deltas[-1].get("tool_call") if self._deltas else None
        if last is not None and last["index"] == delta["index"]:
            last["arguments"] = last.get("arguments", "") + delta.get("arguments", "")
        else:
            self._deltas.append({"tool_call": delta})

    def finish(self) -> None:
        if self._held and not self._beside:
            self._join("content", self._held)
        self._held = ""


class Call:
    """One call as it is read. It is shown once its name is known and its arguments have begun."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.name = self.id = ""
        self._waiting = ""
        self._index: int | None = None

    @property
    def begun(self) -> bool:
        return self._index is not None or bool(self._waiting)

    def arguments(self, text: str) -> None:
        """A piece of their JSON."""
        if self._index is None and self.name:
            self._index = self._answer.opened()
            delta = ToolCallDelta(index=self._index, name=self.name, arguments=self._waiting + text)
            self._answer.piece({**delta, "id": self.id} if self.id else delta)
        elif self._index is None:
            self._waiting += text
        else:
            self._answer.piece({"index": self._index, "arguments": text})

    def close(self) -> None:
        """Its text is over. Raises MalformedError when it had no name."""
        if not self.name:
            raise MalformedError
        if self._index is None:
            self.arguments("" if self._waiting else "{}")


Program = Callable[[Source, Answer], Reading[None]]


class Machine:
    """Implements `AnswerParser` by a program that reads a source into an answer."""

    def __init__(self, program: Program) -> None:
        self.source = Source()
        self.answer = Answer(self.source)
        self._reading = program(self.source, self.answer)
        self._run()

    def _run(self) -> None:
        next(self._reading, None)

    def push(self, text: str, token_ids: Sequence[int]) -> list[Delta]:
        if text:
            self.source.feed(text)
            self._run()
        return self.answer.take()

    def finish(self) -> list[Delta]:
        self.source.ended = True
        self._run()
        self.answer.finish()
        return self.answer.take()


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
