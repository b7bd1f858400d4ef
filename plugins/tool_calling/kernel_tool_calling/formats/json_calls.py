"""Formats whose calls are JSON objects with a name and arguments."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kernel_tool_calling.answer import Answer
from kernel_tool_calling.contract import Message
from kernel_tool_calling.formats.shapes import LeadingFormat, MarkedFormat, Tools
from kernel_tool_calling.json_text import arguments, call_object, call_objects
from kernel_tool_calling.source import MalformedError, Reading, Source

NAME = re.compile(r"[\w.\-]*")
CALL_ID = re.compile(r"[A-Za-z0-9_\-]*")


def hermes(source: Source, answer: Answer, tools: Tools, marker: str) -> Reading[None]:
    """<tool_call>{"name": "f", "arguments": {...}}</tool_call>; several objects in one pair of tags are read too."""
    yield from source.space()
    yield from call_object(source, answer)
    while True:
        source.mark()
        yield from source.space()
        if (yield from source.closing("</tool_call>")):
            return
        yield from call_object(source, answer)


def mistral(source: Source, answer: Answer, tools: Tools, marker: str) -> Reading[None]:
    """[TOOL_CALLS][{"name": "f", "arguments": {...}}, ...], or, newer, [TOOL_CALLS]f[CALL_ID]id[ARGS]{...} for each call."""
    yield from source.space()
    first = yield from source.peek()
    if first == "[":
        yield from call_objects(source, answer)
    elif first == "{":
        yield from call_object(source, answer)
    else:
        yield from _named(source, answer)


def _named(source: Source, answer: Answer) -> Reading[None]:
    call = answer.call()
    call.name = yield from _consumed(source, NAME)
    if not call.name:
        raise MalformedError
    if (yield from source.match("[CALL_ID]")):
        call.id = yield from _consumed(source, CALL_ID)
    yield from source.match("[ARGS]")
    yield from source.space()
    yield from arguments(source, call)
    call.close()


def _consumed(source: Source, allowed: re.Pattern[str]) -> Reading[str]:
    word = yield from source.word(allowed)
    source.at += len(word)
    return word


def short_ids(messages: Sequence[Message]) -> Sequence[Message]:
    """Ids have nine characters: of a longer one its last nine."""

    def short(call: Message) -> Message:
        return {**call, "id": str(call["id"])[-9:]} if "id" in call else call

    made: list[Message] = []
    for message in messages:
        calls = [short(call) for call in message.get("tool_calls") or ()]
        answered = message.get("tool_call_id")
        changed = ({"tool_calls": calls} if calls else {}) | ({"tool_call_id": answered[-9:]} if answered else {})
        made.append({**message, **changed})
    return made


def llama3_json(source: Source, answer: Answer, tools: Tools, marker: str) -> Reading[None]:
    """{"name": "f", "parameters": {...}}; more after ";". Nothing marks a call, so it must name a tool that was given."""
    yield from call_object(source, answer, tools)
    while True:
        source.mark()
        yield from source.space()
        if not (yield from source.match(";", ",")):
            raise MalformedError  # whatever it is, it is content
        yield from source.space()
        yield from call_object(source, answer, tools)


def json_list(source: Source, answer: Answer, tools: Tools, marker: str) -> Reading[None]:
    """[{"name": "f", "arguments": {...}}, ...]: what a grammar makes of a tool_choice."""
    yield from call_objects(source, answer, tools)


HERMES = MarkedFormat(("<tool_call>",), hermes, ("<tool_call>",), unlike=("<arg_key>", "<function="))
MISTRAL = MarkedFormat(("[TOOL_CALLS]",), mistral, ("[TOOL_CALLS]",), messages=short_ids)
LLAMA3_JSON = LeadingFormat(("<|python_tag|>",), llama3_json, ("<|python_tag|>", "dictionary of argument name and its value"))
JSON_LIST = LeadingFormat((), json_list, ())
