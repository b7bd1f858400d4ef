"""The library llguidance: small, compiles in milliseconds, and refuses what it does not do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, StructTag, grammar_from

from kernel_core.api import RequestError
from kernel_guided_decoding.backends import Mark, Spacing, Tag, Unusable
from kernel_guided_decoding.keywords import OVERLAPPING, all_schemas, refuse_keywords

SPACING: Mapping[str, Mapping[str, Any]] = {
    "spaced": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "compact": {"whitespace_flexible": False},
    "flexible": {"whitespace_flexible": True},
}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def limits() -> LLParserLimits:
    """For compiling and for every step: some 100 ms at the very most, and no parts of the grammar in messages."""
    return LLParserLimits(verbose_errors=False)


class LLGuidance:
    """Implements `Library`."""

    def choice(self, texts: Sequence[str]) -> str:
        # a terminal: thousands of texts are one automaton
        ways = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        return checked(LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {ways}"))

    def regex(self, pattern: str) -> str:
        return checked(LLMatcher.grammar_from_regex(pattern))

    def json_schema(self, schema: Any, spacing: Spacing) -> str:
        check_schema(schema)
        return checked(
            LLMatcher.grammar_from_json_schema({} if schema is True else schema, overrides=dict(SPACING[spacing])), schema
        )

    def grammar(self, text: str) -> str:
        return checked(grammar_from("ebnf" if "::=" in text else "lark", text))

    def structural_tag(self, tags: Sequence[Tag], spacing: Spacing, mark: Mark) -> str:
        made = []
        for tag in tags:
            check_schema(tag.schema)
            schema = {**({} if tag.schema is True else tag.schema), "x-guidance": SPACING[spacing]}
            made.append(StructTag(trigger=tag.trigger, begin=tag.begin, grammar=schema, end=tag.end))
        return checked(_write_tags(made, mark), [tag.schema for tag in tags])

    def tokens(self, file: Path, vocab_size: int, ends: Sequence[int], threads: int) -> Tokens:
        try:
            return Tokens(LLTokenizer(file.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=list(ends)), threads)
        except BaseException as error:
            if not isinstance(error, (OSError, ValueError)) and type(error).__name__ != "PanicException":
                raise
            raise RequestError(f"guided decoding is unavailable for this tokenizer: {error}") from error


BACKEND = LLGuidance()


def _write_tags(tags: list[StructTag], mark: Mark) -> str:
    """A mark <...> that is one token of the model is no text to the library, neither as a trigger nor as an end."""

    def marks(texts: set[str]) -> list[str]:
        return [text for text in texts if text.startswith("<") and text.endswith(">") and mark(text) != "text"]

    written = StructTag.to_grammar(tags, assume_special=bool(marks({tag.trigger for tag in tags})))
    for end in marks({tag.end for tag in tags}):
        written = written.replace(f" {json.dumps(end)}\n", f" {end}\n")
    return written


def check_schema(schema: Any) -> None:
    """Raises RequestError naming the first keyword, and where it is, that the library would not honour exactly."""
    for path, part in all_schemas(schema, "#"):
        refuse_keywords(part, path)
        for name in BOUNDS:
            bound = part.get(name)
            if isinstance(bound, float) and not bound.is_integer():
                raise Unusable(f"{name} = {bound} (at {path}) is not supported: bounds of numbers must be whole")


@lru_cache(maxsize=1024)
def _problem(grammar: str) -> str:
    """What is wrong with a grammar, or warned of; empty: nothing."""
    bad, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=limits())
    if not bad:  # what needs the tokenizer is seen by the compiler
        messages = [text for text in messages if "no tokenizer" not in text]
    return messages[0] if messages else "it is not valid" if bad else ""


def checked(grammar: str, schema: Any = None) -> str:
    """The grammar. Raises RequestError with the library's reason."""
    problem = _problem(grammar)
    if "coerce_one_of" in problem:
        places = [path for path, part in all_schemas(schema, "#") if "oneOf" in part]
        raise RequestError(OVERLAPPING.format(at=f" (at {' or '.join(places[:3])})" if places else ""))
    if problem:
        raise Unusable(problem)
    return grammar


class Tokens:
    """Implements `backends.Tokens`."""

    def __init__(self, table: LLTokenizer, threads: int) -> None:
        self.table, self._executor = table, LLExecutor(threads)

    def compile(self, grammar: str) -> Matcher:
        try:
            matcher = LLMatcher(self.table, grammar, log_level=0, limits=limits())
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise RequestError(f"the grammar cannot be compiled: {error}") from error
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be compiled: {_short(matcher)}")
        return Matcher(matcher)

    def fill(self, matchers: Sequence[Matcher], rows: np.ndarray) -> Sequence[str]:
        """With the library's own threads."""
        pairs = [(matcher.inner, row) for row, matcher in enumerate(matchers)]
        self._executor.unsafe_compute_mask_ptr(pairs, rows.ctypes.data, rows.shape[1] * 4, len(rows))
        return [_short(matcher.inner) for matcher in matchers]


class Matcher:
    """Implements `backends.Matcher`."""

    def __init__(self, inner: LLMatcher) -> None:
        self.inner = inner

    def copy(self) -> Matcher:
        return Matcher(self.inner.deep_copy())

    def advance(self, tokens: Sequence[int]) -> str:
        return "" if self.inner.consume_tokens(list(tokens)) else _short(self.inner)

    def try_advance(self, token: int) -> bool:
        return self.inner.try_consume_tokens([token]) == 1

    def rollback(self, count: int) -> None:
        self.inner.rollback(count)

    def fill(self, row: np.ndarray) -> str:
        self.inner.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        return _short(self.inner)

    def accepting(self) -> bool:
        return self.inner.is_accepting()


def _short(matcher: LLMatcher) -> str:
    return " ".join(matcher.get_error().split())[:500] if matcher.is_error() else ""
