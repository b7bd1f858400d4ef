"""What a request says about tools, checked before anything is generated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kernel_core.api import RequestError
from kernel_tool_calling.contract import Schema

NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
MOST = 256


def tool_schemas(tools: Sequence[Mapping[str, Any]]) -> dict[str, Schema]:
    """Name → schema of the arguments. Raises RequestError."""
    if len(tools) > MOST:
        raise RequestError(f"{len(tools)} tools are too many: at most {MOST}")
    found: dict[str, Schema] = {}
    for place, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise RequestError(
                f"tools[{place}] must be a function whose name has 1 to 64 letters, digits, '_', '-' or '.', not {name!r}"
            )
        if name in found:
            raise RequestError(f"tools[{place}]: there are two tools named {name!r}")
        schema = function.get("parameters") or {"type": "object", "properties": {}}  # type: ignore[union-attr]
        if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
            raise RequestError(f"tools[{place}]: the parameters of {name!r} must be a JSON schema of type object")
        found[name] = schema
    return found


def chosen_tools(choice: str | Mapping[str, Any], known: Mapping[str, Schema]) -> Mapping[str, Schema] | None:
    """The tools of which one must be called; None: none must. Raises RequestError."""
    if choice in ("auto", "none"):
        return None
    if not known:
        raise RequestError("tool_choice needs tools")
    if choice == "required":
        return known
    name = (choice.get("function", choice) or {}).get("name") if isinstance(choice, Mapping) else None
    if name not in known:
        wanted = f'"auto", "none", "required" or a function of tools ({", ".join(sorted(known))})'
        raise RequestError(f"tool_choice must be {wanted}, not {name or choice!r}")
    return {name: known[name]}


def check_results(messages: Sequence[Mapping[str, Any]]) -> None:
    """Every tool message answers a call that was made before it, once. Raises RequestError."""
    open_calls: set[str] = set()
    made: set[str] = set()
    for place, message in enumerate(messages):
        calls = message.get("tool_calls") or () if message.get("role") == "assistant" else ()
        for call in calls:
            if call.get("id") is not None:
                open_calls.add(call["id"])
        made |= {"call"} if calls else set()
        if message.get("role") == "tool":
            _check_result(message, place, open_calls, bool(made))


def _check_result(message: Mapping[str, Any], place: int, open_calls: set[str], made: bool) -> None:
    answered = message.get("tool_call_id")
    if not made:
        raise RequestError(f"messages[{place}] is the result of a tool, but no assistant message before it has tool_calls")
    if answered is None:
        raise RequestError(f"messages[{place}] is the result of a tool and needs the tool_call_id of the call that it answers")
    if answered not in open_calls:
        known = ", ".join(sorted(open_calls)) or "none is left"
        raise RequestError(f"messages[{place}]: no unanswered call has the tool_call_id {answered!r} (open: {known})")
    open_calls.discard(answered)
