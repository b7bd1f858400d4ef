"""Calls whose arguments are elements, as Qwen3-Coder writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from kernel_tool_calling.answer import Answer, Call, quoted
from kernel_tool_calling.contract import Schema
from kernel_tool_calling.formats.shapes import MarkedFormat, Tools
from kernel_tool_calling.source import MalformedError, Reading, Source


def qwen3_coder(source: Source, answer: Answer, tools: Tools, marker: str) -> Reading[None]:
    """<tool_call><function=f><parameter=x>value</parameter></function></tool_call>, with line breaks; the
    outer tag may be missing."""
    if marker == "<tool_call>":
        yield from source.space()
        yield from source.expect("<function=")
    name = (yield from source.before(">")).strip()
    if not name or "\n" in name:
        raise MalformedError
    call = answer.call()
    call.name = name
    yield from source.space()
    while (yield from source.match("<parameter=")):
        key = (yield from source.before(">")).strip()
        call.arguments(f"{', ' if call.begun else '{'}{quoted(key)}: ")
        yield from _value(source, call, _types(tools.get(name, {}), key))
        yield from source.space()
    if not (yield from source.closing("</function>")):
        raise MalformedError
    call.arguments("}" if call.begun else "{}")
    source.mark()
    yield from source.space()
    if (yield from source.closing("</tool_call>")):
        source.release()
    else:
        answer.content(source.give_back())


def _types(schema: Schema, key: str) -> set[str]:
    """The JSON types that the schema allows for an argument; empty: it does not say."""
    return _named_types((schema.get("properties") or {}).get(key))


def _named_types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type") or []
    types = {named} if isinstance(named, str) else {one for one in named if isinstance(one, str)}
    types |= {"string"} if not types and all(isinstance(one, str) for one in schema.get("enum") or [0]) else set()
    return types.union(*(_named_types(one) for kind in ("anyOf", "oneOf") for one in schema.get(kind) or []))


class Line:
    """Text without the one line break at either end, as pieces of a JSON string."""

    def __init__(self, sink: Callable[[str], None]) -> None:
        self._sink, self._held, self._started = sink, "", False

    def push(self, text: str) -> None:
        if not self._started and text:
            self._started, text = True, text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        self._sink(quoted(text.removesuffix("\n"))[1:-1])


def _value(source: Source, call: Call, types: set[str]) -> Reading[None]:
    if types == {"string"}:
        call.arguments('"')
        yield from _closed(source, Line(call.arguments).push)
        call.arguments('"')
        return
    parts: list[str] = []
    yield from _closed(source, Line(parts.append).push)
    call.arguments(_converted(json.loads(f'"{"".join(parts)}"'), types))


def _closed(source: Source, sink: Callable[[str], None]) -> Reading[None]:
    if not (yield from source.until(("</parameter>",), sink)):
        raise MalformedError


def _converted(text: str, types: set[str]) -> str:
    """As JSON: what reads as a value of one of these types, or else a string."""
    word = text.strip()
    plain = {"True": "true", "False": "false", "None": "null"}.get(word, word)
    try:
        value = json.loads(plain, parse_constant=float)
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return quoted(text)
    return quoted(text) if types and not types & _types_of(value) else written


def _types_of(value: Any) -> set[str]:
    if isinstance(value, bool) or value is None:
        return {"null" if value is None else "boolean"}
    if isinstance(value, int):
        return {"integer", "number"}
    if isinstance(value, float):
        return {"number", "integer"} if value.is_integer() else {"number"}
    return {"string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"}


QWEN3_CODER = MarkedFormat(("<tool_call>", "<function="), qwen3_coder, ("<tool_call>", "<function=", "<parameter="))
