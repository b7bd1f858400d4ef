"""What `LLM` gains: reading an answer without a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from kernel_core.api import BuildContext, RequestOutput, Verb
from kernel_tool_calling.contract import Delta
from kernel_tool_calling.service import make_tools


def make_verbs(context: BuildContext) -> Mapping[str, Verb]:
    provider = cache(lambda: make_tools(context))

    def read_answer(
        call: Any, output: RequestOutput, tools: Sequence[Mapping[str, Any]] = (), index: int = 0, parallel: bool = True
    ) -> dict[str, Any]:
        """One completion of a chat as the assistant's message: role, content, and where there are any reasoning_content and
        tool_calls. Their arguments are objects, or the text itself where it is none, as chat templates take them. Append the
        message, then one {"role": "tool", "tool_call_id": ..., "content": ...} for each call. Raises RequestError for tools
        that are no functions."""
        service = provider()
        turn = service.begin((), tools, "auto" if tools else "none", parallel, {})
        one = output.outputs[index]
        raw = turn.fields.get("skip_special_tokens") is False
        ids = [token for token in one.token_ids if token not in service.codec.eos_ids]
        text = service.codec.decode(ids, skip_special_tokens=False) if raw else one.text
        parser = turn.parser(output.prompt_token_ids)
        found = message(parser.push(text, one.token_ids) + parser.finish())
        for called in found.get("tool_calls", ()):
            called["function"]["arguments"] = _object(called["function"]["arguments"])
        return dict(service.form.messages([found])[0]) if service.form is not None else found

    return {"read_answer": read_answer}


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # cut, or broken by the model
        return text


def message(deltas: Sequence[Delta]) -> dict[str, Any]:
    """All deltas of an answer as the message of an assistant."""
    calls: dict[int, dict[str, Any]] = {}
    for piece in (delta["tool_call"] for delta in deltas if "tool_call" in delta):
        call = calls.setdefault(piece["index"], {"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call["id"] = piece.get("id", call["id"])
        call["function"]["name"] = piece.get("name", call["function"]["name"])
        call["function"]["arguments"] += piece.get("arguments", "")
    made: dict[str, Any] = {"role": "assistant", "content": "".join(delta.get("content", "") for delta in deltas)}
    reasoning = "".join(delta.get("reasoning", "") for delta in deltas)
    if reasoning:
        made["reasoning_content"] = reasoning
    if calls:
        made["tool_calls"] = list(calls.values())
    return made
