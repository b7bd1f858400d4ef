"""Keywords of JSON schemas that no back end honours, and what is said of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from kernel_core.api import RequestError

#: keywords whose value is schemas by name, and whose value is none
NAMED = ("properties", "patternProperties", "$defs", "definitions")
DATA = ("const", "enum", "default", "examples", "example")
REFUSED = (
    *("uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
    *("$dynamicRef", "$recursiveRef", "x-guidance"),
)
HARMLESS = ({"uniqueItems": False},)
OVERLAPPING = (
    "structured_outputs: one value may fit several alternatives of a oneOf{at}, and only one may fit. Make them exclude each"
    " other (by `type`, or by a required key whose `const` differs), or write anyOf"
)


def refuse_keywords(part: Mapping[str, Any], path: str) -> None:
    """Of one schema, not of those within. Raises RequestError naming the first that is not honoured, and where it is."""
    for name in REFUSED:
        if name in part and {name: part[name]} not in HARMLESS:
            raise RequestError(f"structured_outputs: {name} (at {path}) is not supported in a JSON schema; leave it out")
    if part.get("minProperties", 0) > 1:  # a key may be written twice, and counts once
        raise RequestError(f"structured_outputs: minProperties > 1 (at {path}) is not supported; state `required` keys")


def all_schemas(schema: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All schemas within one, with their paths: also what a reference may lead to, as #/components/schemas/Name."""
    if isinstance(schema, list):
        for number, part in enumerate(schema):
            yield from all_schemas(part, f"{path}/{number}")
    if not isinstance(schema, Mapping):
        return
    yield path, schema
    for name, value in schema.items():
        if name in NAMED and isinstance(value, Mapping):
            for key, part in value.items():
                yield from all_schemas(part, f"{path}/{name}/{key}")
        elif name not in DATA:
            yield from all_schemas(value, f"{path}/{name}")
