"""Text that comes in pieces, read by generators: a reading yields where it must wait for more text. So every format is written as
if the text were whole, and what it finds cannot depend on how the text was cut."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
Sink = Callable[[str], None]


class MalformedError(Exception):
    """Here stands something else than the format says. Caught in `Machine`; nobody else sees it."""


@lru_cache(256)
def _any_of(literals: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str], int]:
    """(what finds one of them, their first characters, length of the longest)."""
    pattern = re.compile("|".join(map(re.escape, literals)))
    return pattern, frozenset(literal[0] for literal in literals), max(map(len, literals))


def _partial(tail: str, literals: tuple[str, ...], firsts: frozenset[str]) -> int:
    """How many characters at the end of `tail`, which is shorter than the longest literal, may be the beginning of one."""
    for at, letter in enumerate(tail):
        if letter in firsts and any(literal.startswith(tail[at:]) for literal in literals):
            return len(tail) - at
    return 0


class Source:
    """Not yet read text from `at` on. A mark keeps what is read from there on, to give it back."""

    __slots__ = ("_mark", "at", "ended", "text")

    def __init__(self) -> None:
        self.text, self.at, self.ended = "", 0, False
        self._mark: int | None = None

    def feed(self, text: str) -> None:
        start = self.at if self._mark is None else self._mark
        self.text = self.text[start:] + text
        self.at, self._mark = self.at - start, None if self._mark is None else 0

    # ---- marks

    def mark(self, back: int = 0) -> None:
        """From here, or `back` characters earlier."""
        self._mark = self.at - back

    def release(self) -> None:
        self._mark = None

    def give_back(self) -> str:
        """What was read since the mark; "" without one."""
        start, self._mark = self._mark, None
        return "" if start is None else self.text[start : self.at]

    @property
    def over(self) -> bool:
        """Nothing is left and nothing comes."""
        return self.ended and self.at == len(self.text)

    # ---- readings

    def peek(self) -> Reading[str]:
        """The next character, not consumed; "": the text is over."""
        while self.at == len(self.text):
            if self.ended:
                return ""
            yield
        return self.text[self.at]

    def ahead(self, count: int) -> Reading[str]:
        """The next so many characters, not consumed; fewer where the text is over."""
        while len(self.text) - self.at < count and not self.ended:
            yield
        return self.text[self.at : self.at + count]

    def match(self, *literals: str) -> Reading[str]:
        """The literal that stands here, consumed; "" if none does. A literal that begins another one comes after it."""
        longest = max(map(len, literals))
        while True:
            here = self.text[self.at : self.at + longest]
            if self.ended or not any(len(here) < len(one) and one.startswith(here) for one in literals):
                found = next((one for one in literals if here.startswith(one)), "")
                self.at += len(found)
                return found
            yield

    def expect(self, *literals: str) -> Reading[str]:
        found = yield from self.match(*literals)
        if not found:
            raise MalformedError
        return found

    def closing(self, *literals: str) -> Reading[str]:
        """As `match`, of marks that end something: one that the end of the text cut counts too."""
        found = yield from self.match(*literals)
        rest = self.text[self.at :]
        if not found and rest:
            found = next((one for one in literals if one.startswith(rest)), "")
            self.at += len(rest) if found else 0
        return found

    def run(self, allowed: re.Pattern[str], sink: Sink) -> Reading[None]:
        """Gives the longest run that matches `allowed` (a repeated character class) to `sink`, as it comes."""
        while True:
            found = allowed.match(self.text, self.at)
            if found is not None and found.end() > self.at:
                self.at = found.end()
                sink(found[0])
            if self.at < len(self.text) or self.ended:
                return
            yield

    def word(self, allowed: re.Pattern[str]) -> Reading[str]:
        """The longest run of `allowed`, not consumed."""
        while True:
            found = allowed.match(self.text, self.at)
            word = found[0] if found is not None else ""
            if self.at + len(word) < len(self.text) or self.ended:
                return word
            yield

    def space(self) -> Reading[None]:
        yield from self.run(SPACE, _forget)

    def until(self, literals: tuple[str, ...], sink: Sink) -> Reading[str]:
        """Gives the text before the first of `literals` to `sink`, as it comes, and consumes that one; "": the text is over."""
        if not literals:
            return (yield from self._rest(sink))
        pattern, firsts, longest = _any_of(literals)
        while True:
            found = pattern.search(self.text, self.at)
            end = found.start() if found is not None else len(self.text)
            if found is None and not self.ended:
                end -= _partial(self.text[max(self.at, end + 1 - longest) :], literals, firsts)
            if end > self.at:
                start, self.at = self.at, end
                sink(self.text[start:end])
            if found is not None:
                self.at = found.end()
                return found[0]
            if self.ended:
                return ""
            yield

    def _rest(self, sink: Sink) -> Reading[str]:
        """All that comes."""
        while True:
            if self.at < len(self.text):
                start, self.at = self.at, len(self.text)
                sink(self.text[start:])
            if self.ended:
                return ""
            yield

    def before(self, *literals: str) -> Reading[str]:
        """The text before the first of `literals`, which is consumed too."""
        parts: list[str] = []
        if not (yield from self.until(literals, parts.append)):
            raise MalformedError
        return "".join(parts)


SPACE = re.compile(r"\s*")


def _forget(text: str) -> None:
    """A sink for what nobody needs."""
