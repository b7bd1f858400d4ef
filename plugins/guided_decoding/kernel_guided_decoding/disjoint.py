"""Whether the alternatives of a `oneOf` exclude each other, as far as types, constants and required keys show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

TYPES = ("object", "array", "string", "number", "boolean", "null")
DEEPEST = 8
Resolve = Callable[[Any], Any]  # a reference → what it leads to


def type_of(value: Any) -> str:
    """Of a JSON value; "integer" of a whole number."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, (int, float)):
        return "integer" if value == int(value) else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def exclusive(options: Sequence[Any], resolve: Resolve) -> bool:
    return all(_apart(one, other, resolve, 0) for one, other in combinations(options, 2))


def _apart(one: Any, other: Any, resolve: Resolve, depth: int) -> bool:
    """No value fits both."""
    one, other = _followed(one, resolve), _followed(other, resolve)
    if depth > DEEPEST or one is None or other is None:
        return False
    if not _types(one) & _types(other):
        return True
    values = _values(one), _values(other)
    if None not in values:
        return not any(_same(a, b) for a in values[0] for b in values[1])
    return _types(one) == _types(other) == {"object"} and _keys_apart(one, other, resolve, depth)


def _keys_apart(one: Mapping[str, Any], other: Mapping[str, Any], resolve: Resolve, depth: int) -> bool:
    needed = set(one.get("required", ())), set(other.get("required", ()))
    known = one.get("properties", {}), other.get("properties", {})
    for name in needed[0] & needed[1]:
        if name in known[0] and name in known[1] and _apart(known[0][name], known[1][name], resolve, depth + 1):
            return True
    return any(needed[i] - set(known[1 - i]) and _closed((one, other)[1 - i]) for i in (0, 1))


def _closed(schema: Mapping[str, Any]) -> bool:
    return schema.get("additionalProperties") is False and not schema.get("patternProperties")


def _followed(schema: Any, resolve: Resolve) -> Mapping[str, Any] | None:
    """What references lead to; None: no object, or they go in a circle."""
    for _ in range(DEEPEST):
        if not isinstance(schema, Mapping) or "$ref" not in schema:
            return schema if isinstance(schema, Mapping) else None
        schema = resolve(schema["$ref"])
    return None


def _values(schema: Mapping[str, Any]) -> Sequence[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    return schema.get("enum")


def _types(schema: Mapping[str, Any]) -> set[str]:
    values, named = _values(schema), schema.get("type", TYPES)
    found = {type_of(value) for value in values} if values is not None else {named} if isinstance(named, str) else set(named)
    return {"number" if kind == "integer" else kind for kind in found}


def _same(one: Any, other: Any) -> bool:
    """As JSON compares: 1 is 1.0, and true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)
    return one == other
