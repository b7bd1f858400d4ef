"""From what a request asks to a grammar of llguidance. Whatever that library does not honour exactly is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher, StructTag
from llguidance.gbnf_to_lark import any_to_lark

from kernel_core.api import RequestError
from kernel_guided_decoding.fields import KINDS, StructuralTag, StructuredOutputs

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
SPACING = {
    "fixed": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": False},
    "flexible": {"whitespace_flexible": True, "lenient": False},
}
ANCHORS = re.compile(r"^\^?(.*?)((?<!\\)(?:\\\\)*)\$?$", re.DOTALL)


def make_grammar(wanted: StructuredOutputs, spacing: str, max_bytes: int) -> str:
    """Raises RequestError for what is no grammar, is too large, or has parts that cannot be honoured exactly."""
    given = wanted.given
    if len(given) != 1:
        found = f"it has {sorted(given)}" if given else "it has none"
        raise RequestError(f"structured_outputs takes exactly one of {', '.join(KINDS)}; {found}")
    kind, value = next(iter(given.items()))
    grammar = MAKERS[kind](value, spacing)
    if len(grammar) > max_bytes:
        raise RequestError(f"structured_outputs.{kind} makes a grammar of {len(grammar)} bytes; at most {max_bytes} are taken")
    if error := LLMatcher.validate_grammar(grammar):
        raise RequestError(f"structured_outputs.{kind} cannot be honoured: {error.strip()}")
    return grammar


def _json(schema: Mapping[str, Any] | bool | str, spacing: str) -> str:
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except ValueError as error:
            raise RequestError(f"structured_outputs.json is a text that is not JSON: {error}") from error
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise RequestError(f"structured_outputs.json must be a JSON schema (an object), not {schema!r:.40}")
    _check_bounds(schema)
    try:
        return LLMatcher.grammar_from_json_schema(dict(schema), overrides=SPACING[spacing])
    except ValueError as error:
        raise RequestError(f"structured_outputs.json: {error}") from error


def _check_bounds(schema: Any) -> None:
    """The library forgets 2.2 below a maximum of 2.25."""
    for name, bound in _bounds(schema):
        if -Decimal(str(bound)).as_tuple().exponent > 1:
            raise RequestError(f'the schema has "{name}": {bound}; a bound with more than one decimal is not honoured exactly')


def _bounds(schema: Any) -> Iterator[tuple[str, float]]:
    """Every bound of a number anywhere in a schema."""
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            if name in BOUNDS and isinstance(value, float):
                yield name, value
            elif name not in ("const", "enum", "default", "examples"):
                yield from _bounds(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _bounds(item)


def _regex(pattern: str, spacing: str) -> str:
    """The whole output matches, so anchors at the ends say nothing."""
    body, escapes = ANCHORS.match(pattern).groups()
    return LLMatcher.grammar_from_regex(body + escapes)


def _choice(texts: list[str], spacing: str) -> str:
    if "" in texts:
        raise RequestError("structured_outputs.choice contains an empty text")
    return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))


def _grammar(text: str, spacing: str) -> str:
    try:
        return LLMatcher.grammar_from_lark(any_to_lark(text))
    except Exception as error:
        raise RequestError(f"structured_outputs.grammar is neither Lark nor EBNF: {error}") from error


def _structural_tag(tag: StructuralTag, spacing: str) -> str:
    tags = []
    for structure in tag.structures:
        trigger = next((t for t in tag.triggers if structure.begin.startswith(t)), None)
        if trigger is None:
            raise RequestError(f"structural_tag: no trigger begins {structure.begin!r}")
        _check_bounds(structure.schema_)
        schema = {**structure.schema_, "x-guidance": SPACING[spacing]}
        tags.append(StructTag(trigger=trigger, begin=structure.begin, grammar=schema, end=structure.end))
    return LLMatcher.grammar_from_lark(StructTag.to_grammar(tags, assume_special=False))


MAKERS = {
    "json": _json,
    "json_object": lambda value, spacing: _json({"type": "object"}, spacing),
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "structural_tag": _structural_tag,
}
