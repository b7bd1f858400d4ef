"""JSON as it comes: checked while it is read, and handed on in pieces."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from kernel_tool_calling.answer import Answer, Call
from kernel_tool_calling.source import MalformedError, Reading, Sink, Source

DEEPEST = 64
PLAIN = re.compile(r'[^"\\]*')
SCALAR = re.compile(r"[A-Za-z0-9+\-.]*")
NUMBER_OR_WORD = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?|true|false|null")
ESCAPE = re.compile(r'\\(["\\/bfnrt]|u[0-9a-fA-F]{4})')
CONTROL = re.compile("[\x00-\x1f]")
BLANK = re.compile(r"[ \t\r\n]*")


def escaped(text: str) -> str:
    """Control characters, which models write into strings as they are, as JSON wants them."""
    return CONTROL.sub(lambda found: json.dumps(found[0])[1:-1], text)


def string(source: Source, sink: Sink) -> Reading[None]:
    sink((yield from source.expect('"')))
    while True:
        yield from source.run(PLAIN, lambda text: sink(escaped(text)))
        mark = yield from source.peek()
        if mark != "\\":
            sink((yield from source.expect('"')))
            return
        sink((yield from _escape(source)))


def _escape(source: Source) -> Reading[str]:
    found = yield from source.ahead(2)
    if found == "\\u":
        found = yield from source.ahead(6)
    whole = ESCAPE.fullmatch(found)
    cut = source.ended and source.at + len(found) == len(source.text)
    if not whole and not cut:
        raise MalformedError
    source.at += len(found)
    return found


def value(source: Source, sink: Sink, depth: int = 0) -> Reading[None]:
    """Any value, whose text goes to `sink`. Raises MalformedError where it is none; what came before is in the sink."""
    first = yield from source.peek()
    if first == '"':
        yield from string(source, sink)
    elif first in ("{", "["):
        yield from _container(source, sink, depth + 1)
    else:
        yield from _scalar(source, sink)


def _scalar(source: Source, sink: Sink) -> Reading[None]:
    word = yield from source.word(SCALAR)
    cut = source.ended and source.at + len(word) == len(source.text)
    if not NUMBER_OR_WORD.fullmatch(word) and not cut:
        raise MalformedError
    source.at += len(word)
    sink(word)


def _container(source: Source, sink: Sink, depth: int) -> Reading[None]:
    if depth > DEEPEST:
        raise MalformedError
    opening = yield from source.expect("{", "[")
    closing = "}" if opening == "{" else "]"
    sink(opening)
    yield from source.run(BLANK, sink)
    end = yield from source.match(closing)
    while not end:
        if closing == "}":
            yield from string(source, sink)
            yield from source.run(BLANK, sink)
            sink((yield from source.expect(":")))
            yield from source.run(BLANK, sink)
        yield from value(source, sink, depth)
        yield from source.run(BLANK, sink)
        end = yield from source.match(closing)
        if not end:
            sink((yield from source.expect(",")))
            yield from source.run(BLANK, sink)
    sink(end)


def text_value(source: Source) -> Reading[str]:
    """A string, decoded."""
    parts: list[str] = []
    yield from string(source, parts.append)
    try:
        return json.loads("".join(parts))
    except ValueError as error:  # cut within an escape
        raise MalformedError from error


# ---- calls


def arguments(source: Source, call: Call) -> Reading[None]:
    """An object; or a string that holds one; or null."""
    first = yield from source.peek()
    if call.begun:
        raise MalformedError
    if first == "{":
        yield from value(source, call.arguments)
    elif first == '"':
        inner = yield from text_value(source)
        if not is_object(inner):
            raise MalformedError
        call.arguments(inner)
    else:
        yield from source.expect("null")
        call.arguments("{}")


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def call_object(source: Source, answer: Answer, known: Mapping[str, object] | None = None) -> Reading[None]:
    """{"name": ..., "arguments" or "parameters": ...} in any order; other keys are passed over. With `known`, other names than
    these are malformed."""
    call = answer.call()
    yield from source.expect("{")
    yield from source.space()
    while not (yield from source.match("}")):
        key = yield from text_value(source)
        yield from source.space()
        yield from source.expect(":")
        yield from source.space()
        yield from _member(source, call, key, known)
        yield from source.space()
        if not (yield from source.match(",")):
            yield from source.expect("}")
            break
        yield from source.space()
    call.close()


def _member(source: Source, call: Call, key: str, known: Mapping[str, object] | None) -> Reading[None]:
    if key == "name":
        call.name = yield from text_value(source)
        if known is not None and call.name not in known:
            raise MalformedError
    elif key in ("arguments", "parameters"):
        yield from arguments(source, call)
    elif key == "id" and (yield from source.peek()) == '"':
        call.id = yield from text_value(source)
    else:
        yield from value(source, lambda text: None)


def call_objects(source: Source, answer: Answer, known: Mapping[str, object] | None = None) -> Reading[None]:
    """A list of them."""
    yield from source.expect("[")
    yield from source.space()
    end = yield from source.match("]")
    while not end:
        yield from call_object(source, answer, known)
        source.mark()
        yield from source.space()
        end = yield from source.match("]")
        if not end:
            yield from source.expect(",")
            yield from source.space()
    source.release()
