"""Calls as a list of Python calls."""

from __future__ import annotations

import ast
import json
import re
import warnings

from kernel_tool_calling.answer import Answer, Call, quoted
from kernel_tool_calling.formats.shapes import LeadingFormat, Tools
from kernel_tool_calling.source import MalformedError, Reading, Source

NAME = re.compile(r"[A-Za-z_][\w.]*|")
LITERAL = re.compile(r"[^\"'\\\[\](){},]*")
CONSTANTS = {"true": "True", "false": "False", "null": "None"}
DEEPEST = 64


def pythonic(source: Source, answer: Answer, tools: Tools, marker: str) -> Reading[None]:
    """[f(x=1, y="a"), g()] with keyword arguments that are literals. It must name tools that were given."""
    yield from source.expect("[")
    end = ","
    while end == ",":
        yield from source.space()
        yield from _call(source, answer, tools)
        source.mark()
        yield from source.space()
        end = yield from source.expect(",", "]")
    source.mark()
    if (yield from source.closing("<|python_end|>")):
        source.release()


def _call(source: Source, answer: Answer, tools: Tools) -> Reading[None]:
    call = answer.call()
    call.name = yield from _name(source)
    if call.name not in tools:
        raise MalformedError
    yield from source.space()
    yield from source.expect("(")
    yield from source.space()
    while not (yield from source.match(")")):
        yield from _argument(source, call)
        yield from source.space()
        if not (yield from source.match(",")):
            yield from source.expect(")")
            break
        yield from source.space()
    call.arguments("}" if call.begun else "{}")


def _name(source: Source) -> Reading[str]:
    name = yield from source.word(NAME)
    source.at += len(name)
    return name


def _argument(source: Source, call: Call) -> Reading[None]:
    key = yield from _name(source)
    yield from source.space()
    yield from source.expect("=")
    parts: list[str] = []
    if not key:
        raise MalformedError
    yield from _literal(source, parts)
    call.arguments(f"{', ' if call.begun else '{'}{quoted(key)}: {_as_json(''.join(parts).strip())}")


def _literal(source: Source, parts: list[str]) -> Reading[None]:
    """Up to the comma or bracket that ends it."""
    depth = 0
    while True:
        yield from source.run(LITERAL, parts.append)
        mark = yield from source.peek()
        if not mark or mark == "\\" or depth > DEEPEST:
            raise MalformedError
        if mark in "\"'":
            yield from _string(source, parts, mark)
            continue
        depth += (mark in "[({") - (mark in "])}")
        if depth < 0 or (depth == 0 and mark == ","):
            return
        source.at += 1
        parts.append(mark)


def _string(source: Source, parts: list[str], quote: str) -> Reading[None]:
    parts.append((yield from source.expect(quote)))
    plain = re.compile(rf"[^{quote}\\]*")
    while True:
        yield from source.run(plain, parts.append)
        if (yield from source.peek()) != "\\":
            parts.append((yield from source.expect(quote)))
            return
        pair = yield from source.ahead(2)
        source.at += len(pair)
        parts.append(pair)


def _as_json(text: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that Python does not know
            value = ast.literal_eval(CONSTANTS.get(text, text))
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise MalformedError from error


PYTHONIC = LeadingFormat(("<|python_start|>",), pythonic, ("<|python_start|>", "[func_name1("))
