"""From what a user gave to a grammar of the chosen back end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kernel_core.api import RequestError
from kernel_guided_decoding.backends import Library, Mark, Spacing, Tag, Unusable

UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError)


def source(library: Library, kind: str, value: Any, spacing: Spacing, max_bytes: int, mark: Mark) -> str:
    """Of one constraint of `StructuredOutputs`, checked; Raises RequestError."""
    try:
        size = len(value if isinstance(value, str) else json.dumps(value))
        if size > max_bytes:
            raise Unusable(f"{kind} has {size} bytes; plugins.guided_decoding.max_bytes is {max_bytes}")
        if kind == "choice":
            if not all(value):
                raise Unusable("choice has an empty text; leave it out")
            return library.choice(value)
        if kind == "json_schema":
            return library.json_schema(_schema(value), spacing)
        if kind == "json_object":
            return library.json_schema({"type": "object"}, spacing)
        if kind == "structural_tag":
            return library.structural_tag(_tags(value), spacing, mark)
        return library.regex(value) if kind == "regex" else library.grammar(value)
    except RequestError:
        raise
    except UNREADABLE as error:
        raise Unusable(f"this {kind} cannot be read: {error}") from error


def _schema(value: Any) -> Any:
    schema = json.loads(value) if isinstance(value, str) else value
    if not isinstance(schema, (dict, bool)):
        raise Unusable("a JSON schema is an object, true or false")
    return schema


def _tags(value: Mapping[str, Any]) -> list[Tag]:
    unknown = set(value) - {"structures", "triggers", "type"}
    structures, triggers = value["structures"], value["triggers"]
    if unknown or not structures:
        raise Unusable('structural_tag has "structures" (at least one) and "triggers", nothing else')
    tags = []
    for part in structures:
        trigger = next((t for t in triggers if t and part["begin"].startswith(t)), None)
        if trigger is None:
            raise Unusable(f"no trigger begins the tag {part['begin']!r}")
        tags.append(Tag(trigger, part["begin"], part["schema"], part["end"]))
    return tags
