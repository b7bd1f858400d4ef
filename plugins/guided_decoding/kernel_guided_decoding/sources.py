"""From what a user gave to a grammar in llguidance's form, and the check that all of it can be honoured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

from llguidance import LLMatcher, LLParserLimits, StructTag, grammar_from

from kernel_core.api import RequestError

SPACING: Mapping[str, Mapping[str, Any]] = {
    "spaced": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    "compact": {"whitespace_flexible": False},
    "flexible": {"whitespace_flexible": True},
}
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
#: keywords whose value is schemas by name, and whose value is none
NAMED = ("properties", "patternProperties", "$defs", "definitions")
DATA = ("const", "enum", "default", "examples", "example")
#: what the back end does not do, or not in full
REFUSED = (
    *("uniqueItems", "contains", "minContains", "maxContains", "not", "if", "then", "else", "propertyNames"),
    *("dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems"),
    *("$dynamicRef", "$recursiveRef", "x-guidance"),
)
HARMLESS = ({"uniqueItems": False},)


def limits() -> LLParserLimits:
    """For compiling and for every step: some 100 ms at the very most, and no parts of the grammar in messages."""
    return LLParserLimits(verbose_errors=False)


def source(kind: str, value: Any, whitespace: str, max_bytes: int, is_token: Callable[[str], bool]) -> str:
    """Of one constraint of `StructuredOutputs`; `is_token`: a text is one token of the model. Raises RequestError."""
    try:
        size = len(value if isinstance(value, str) else json.dumps(value))
        if size > max_bytes:
            raise RequestError(f"structured_outputs: {kind} has {size} bytes; plugins.guided_decoding.max_bytes is {max_bytes}")
        if kind == "structural_tag":
            return _structural_tag(value, whitespace, is_token)
        return _MAKERS[kind](value, whitespace)
    except RequestError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RequestError(f"structured_outputs: this {kind} cannot be read: {error}") from error


def _choice(value: list[str], whitespace: str) -> str:
    if not all(value):
        raise RequestError("structured_outputs: choice has an empty text; leave it out")
    texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
    return LLMatcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")  # a terminal: thousands of texts are one automaton


def _regex(value: str, whitespace: str) -> str:
    return LLMatcher.grammar_from_regex(value)


def _json(value: Any, whitespace: str) -> str:
    schema = json.loads(value) if isinstance(value, str) else value
    if not isinstance(schema, (dict, bool)):
        raise RequestError("structured_outputs: a JSON schema is an object, true or false")
    check_schema(schema)
    return LLMatcher.grammar_from_json_schema({} if schema is True else schema, overrides=dict(SPACING[whitespace]))


def _json_object(value: bool, whitespace: str) -> str:
    return _json({"type": "object"}, whitespace)


def _grammar(value: str, whitespace: str) -> str:
    return grammar_from("ebnf" if "::=" in value else "lark", value)


def _structural_tag(value: Mapping[str, Any], whitespace: str, is_token: Callable[[str], bool]) -> str:
    unknown = set(value) - {"structures", "triggers", "type"}
    structures, triggers = value["structures"], value["triggers"]
    if unknown or not structures:
        raise RequestError('structured_outputs: structural_tag has "structures" (at least one) and "triggers", nothing else')
    tags = []
    for part in structures:
        trigger = next((t for t in triggers if t and part["begin"].startswith(t)), None)
        if trigger is None:
            raise RequestError(f"structured_outputs: no trigger begins the tag {part['begin']!r}")
        schema = part["schema"]
        check_schema(schema)
        schema = {**schema, "x-guidance": SPACING[whitespace]}
        tags.append(StructTag(trigger=trigger, begin=part["begin"], grammar=schema, end=part["end"]))
    return _write_tags(tags, is_token)


def _write_tags(tags: list[StructTag], is_token: Callable[[str], bool]) -> str:
    """A mark <...> that is one token of the model is no text to the back end, neither as a trigger nor as an end."""

    def marks(texts: set[str]) -> list[str]:
        return [text for text in texts if text.startswith("<") and text.endswith(">") and is_token(text)]

    written = StructTag.to_grammar(tags, assume_special=bool(marks({tag.trigger for tag in tags})))
    for end in marks({tag.end for tag in tags}):
        written = written.replace(f" {json.dumps(end)}\n", f" {end}\n")
    return written


_MAKERS = {
    "choice": _choice,
    "regex": _regex,
    "json_schema": _json,
    "json_object": _json_object,
    "grammar": _grammar,
}


def check_schema(schema: Any) -> None:
    """Raises RequestError naming the first keyword, and where it is, that the back end would not honour exactly."""
    for path, part in _schemas(schema, "#"):
        for name in REFUSED:
            if name in part and {name: part[name]} not in HARMLESS:
                raise RequestError(f"structured_outputs: {name} (at {path}) is not supported in a JSON schema; leave it out")
        if part.get("minProperties", 0) > 1:  # a key may be written twice, and counts once
            raise RequestError(f"structured_outputs: minProperties > 1 (at {path}) is not supported; state `required` keys")
        for name in BOUNDS:
            bound = part.get(name)
            if isinstance(bound, float) and not bound.is_integer():
                raise RequestError(
                    f"structured_outputs: {name} = {bound} (at {path}) is not supported: bounds of numbers must be whole"
                )


def _schemas(schema: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """All schemas within one, with their paths: also what a reference may lead to, as #/components/schemas/Name."""
    if isinstance(schema, list):
        for number, part in enumerate(schema):
            yield from _schemas(part, f"{path}/{number}")
    if not isinstance(schema, Mapping):
        return
    yield path, schema
    for name, value in schema.items():
        if name in NAMED and isinstance(value, Mapping):
            for key, part in value.items():
                yield from _schemas(part, f"{path}/{name}/{key}")
        elif name not in DATA:
            yield from _schemas(value, f"{path}/{name}")


@lru_cache(maxsize=1024)
def _problem(grammar: str) -> str:
    """What is wrong with a grammar, or warned of; empty: nothing."""
    bad, messages = LLMatcher.validate_grammar_with_warnings(grammar, None, limits=limits())
    if not bad:  # what needs the tokenizer is seen by the compiler
        messages = [text for text in messages if "no tokenizer" not in text]
    return messages[0] if messages else "it is not valid" if bad else ""


def check(grammar: str) -> None:
    """Raises RequestError with the back end's reason."""
    problem = _problem(grammar)
    if problem:
        raise RequestError(f"structured_outputs: {' '.join(problem.split())[:500]}")
