"""JSON schemas rewritten into the few forms that xgrammar honours exactly; what has no such form is refused by name and place.

xgrammar reads one keyword and passes over those beside it, takes a pattern for the whole text, writes characters raw that JSON
has to escape, and lets a further key repeat a declared one in other letters. So strings and keys become patterns of JSON text,
every schema one of one type, and references lead into `$defs` of our own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor, inf, isfinite
from typing import Any
from urllib.parse import unquote

from kernel_core.api import RequestError
from kernel_guided_decoding.disjoint import TYPES, exclusive, type_of
from kernel_guided_decoding.keywords import OVERLAPPING, refuse_keywords
from kernel_guided_decoding.patterns import Unsupported, json_except, json_lengths, json_pattern

Schema = dict[str, Any]
BY_TYPE: Mapping[str, tuple[str, ...]] = {
    "object": ("properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("pattern", "format", "minLength", "maxLength"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
}
COMBINED = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
CONSTRAINTS = frozenset([*COMBINED, "type", *(name for names in BY_TYPE.values() for name in names)])
DIGITS, LARGEST = 6, 10**15  # of bounds of numbers
MULTIPLE, RANGE = 1024, 10_000  # multipleOf of integers, and the widest range beside it
DEEPEST = 60
MARKS = 0xF0000
# Compiling and masks take time with these: beyond them it is seconds.
ITEMS, LENGTH = 100_000, 1000  # of arrays and strings
PROPERTIES, COUNTED = 500, 64  # of one object, and beside minProperties or maxProperties
EXCEPTED = 3000  # characters of names beside further keys, in the whole schema
TEXTS = 20_000  # characters of all different kinds of strings
HOUR = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
DAY = r"\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
BYTE, LABEL = r"(?:\d|[1-9]\d|1\d\d|2[0-4]\d|25[0-5])", r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
FORMATS = {
    "date": DAY,
    "time": HOUR,
    "date-time": f"{DAY}T{HOUR}",
    "uuid": "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
    "ipv4": rf"(?:{BYTE}\.){{3}}{BYTE}",
    "ipv6": "(?:[0-9a-fA-F]{1,4}:){7}[0-9a-fA-F]{1,4}",
    "hostname": rf"{LABEL}(?:\.{LABEL}){{0,2}}",
    "email": rf"{ATOM}(?:\.{ATOM})*@{LABEL}(?:\.{LABEL}){{0,2}}",
}


def refusal(what: str, path: str, advice: str) -> RequestError:
    return RequestError(f"structured_outputs: {what} (at {path}) is not supported by xgrammar; {advice}")


def lowered(schema: Any) -> tuple[Schema, list[str]]:
    """The whole schema, and what its patterns stand for: pattern `mark(n)`, a class that nothing else has, for expression n of a
    JSON string between its quotes. Raises RequestError naming the keyword and its place, ValueError, TypeError and KeyError for
    what is no JSON schema."""
    lowering = Lowering(schema)
    return lowering.whole(), list(lowering.patterns)


def mark(number: int) -> str:
    """Two characters of the plane for private use."""
    return f"[{chr(MARKS + 2 * number)}-{chr(MARKS + 2 * number + 1)}]"


class Lowering:
    """One schema. `definitions` by name: those of ours, first of the places that references lead to."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.definitions: dict[str, Schema] = {}
        self.names: dict[str, str] = {}  # by reference
        self.texts: dict[str, str] = {}  # names by pattern
        self.patterns: dict[str, str] = {}  # marks by pattern
        self.depth = self.excepted = self.characters = 0

    def whole(self) -> Schema:
        return {**self.lower(self.root, "#"), "$defs": self.definitions}

    def lower(self, node: Any, path: str) -> Schema:
        if node is False:
            raise refusal("false", path, "leave the part out")
        if node is not True and not isinstance(node, Mapping):
            raise RequestError(f"structured_outputs: a JSON schema is an object, true or false (at {path})")
        given = {} if node is True else {name: node[name] for name in node if name in CONSTRAINTS}
        if node is not True:
            refuse_keywords(node, path)
        if not given:
            return self.anything()
        self.depth += 1
        if self.depth > DEEPEST:
            raise RequestError(f"structured_outputs: the schema is nested more than {DEEPEST} levels deep")
        made = self.combined(given, path) if set(given) & set(COMBINED) else self.typed(given, path)
        self.depth -= 1
        return made

    # ---- keywords that stand alone

    def combined(self, given: Schema, path: str) -> Schema:
        kind = next(name for name in COMBINED if name in given)
        beside = [name for name in given if name != kind and not (kind in ("const", "enum") and name == "type")]
        if beside:
            raise refusal(f"{beside[0]} beside {kind}", path, "put both into one schema without it")
        value, here = given[kind], f"{path}/{kind}"
        if kind == "$ref":
            return self.reference(value, path)
        if kind in ("const", "enum"):
            return self.values([value] if kind == "const" else value, given.get("type"), here)
        if not isinstance(value, Sequence) or isinstance(value, str) or not value:
            raise RequestError(f"structured_outputs: {kind} (at {path}) has to be a list of schemas")
        if kind == "allOf" and len(value) > 1:
            raise refusal("allOf of several", path, "write one schema that says all")
        if kind == "oneOf" and not exclusive(value, self.resolve):
            raise RequestError(OVERLAPPING.format(at=f" (at {path})"))
        return one_of([self.lower(option, f"{here}/{number}") for number, option in enumerate(value)])

    def reference(self, pointer: Any, path: str) -> Schema:
        if not isinstance(pointer, str) or not pointer.startswith("#"):
            raise refusal(f"$ref = {pointer!r}", path, "put the schema into $defs and refer to it as #/$defs/name")
        if pointer not in self.names:
            target, seen = self.resolve(pointer), {pointer}
            while isinstance(target, Mapping) and "$ref" in target:
                if target["$ref"] in seen:
                    raise RequestError(f"structured_outputs: $ref = {pointer!r} (at {path}) leads back to itself")
                seen.add(target["$ref"])
                target = self.resolve(target["$ref"])
            name = self.names[pointer] = f"part{len(self.names)}"
            self.definitions[name] = self.lower(self.resolve(pointer), pointer)
        return {"$ref": f"#/$defs/{self.names[pointer]}"}

    def resolve(self, pointer: Any) -> Any:
        """Raises RequestError when it leads nowhere."""
        node = self.root
        for part in str(pointer).removeprefix("#").split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(node, Mapping) and key in node:
                node = node[key]
            elif isinstance(node, list) and key.isdigit() and int(key) < len(node):
                node = node[int(key)]
            else:
                raise RequestError(f"structured_outputs: $ref = {pointer!r} leads nowhere")
        return node

    def values(self, values: Any, types: Any, path: str) -> Schema:
        if not isinstance(values, list) or not values:
            raise RequestError(f"structured_outputs: enum (at {path}) has to be a list of values")
        wanted = named_types(types, path)
        wanted += ["integer"] if "number" in wanted else []
        kept = [literal(value, path) for value in values if type_of(value) in wanted]
        if not kept:
            raise RequestError(f"structured_outputs: no value (at {path}) has the type that is asked for")
        plain = [made["const"] for made in kept if "const" in made]
        return one_of([*([{"enum": plain}] if plain else []), *(made for made in kept if "const" not in made)])

    def anything(self) -> Schema:
        if "any" not in self.definitions:
            ref = {"$ref": "#/$defs/any"}
            self.definitions["any"] = {}
            kinds = [{"type": "number"}, {"type": "boolean"}, {"type": "null"}, self.text(json_lengths(0, None), 0)]
            holders = [{"type": "array", "items": ref}, keyed({self.marked(json_except(())): ref})]
            self.definitions["any"] = one_of([*holders, *kinds])
        return {"$ref": "#/$defs/any"}

    # ---- schemas of a type

    def typed(self, given: Schema, path: str) -> Schema:
        make = {"object": self.object, "array": self.array, "string": self.string, "number": number, "integer": integer}
        kinds = named_types(given.get("type"), path)
        return one_of([make[kind](given, path) if kind in make else {"type": kind} for kind in kinds])

    def string(self, given: Schema, path: str) -> Schema:
        least, most = count(given, "minLength", path), count(given, "maxLength", path)
        pattern, form = given.get("pattern"), given.get("format")
        if pattern is not None and form is not None:
            raise refusal("format beside pattern", path, "leave one of them out")
        if pattern is None and form is None:
            if most is not None and (least or 0) > most:
                raise RequestError(f"structured_outputs: minLength is more than maxLength (at {path})")
            return self.text(json_lengths(least or 0, most), most or least or 0)
        if form is not None and form not in FORMATS:
            raise refusal(f"format = {form!r}", path, f"known are {', '.join(FORMATS)}; or write a pattern")
        wanted = pattern if form is None else f"^{FORMATS[form]}$"
        written, low, high = json_pattern_at(wanted, path)
        if low < (least or 0) or high > (inf if most is None else most):
            name = "maxLength" if high > (inf if most is None else most) else "minLength"
            beside = "format" if form is not None else "pattern"
            raise refusal(
                f"{name} beside a {beside} that allows other lengths", path, "say the length in a pattern, as ^[a-z]{2,8}$"
            )
        return self.text(written, low if high == inf else high)

    def text(self, pattern: str, characters: float) -> Schema:
        """Of one kind of string, which is compiled once."""
        if pattern not in self.texts:
            self.characters += int(characters)
            if self.characters > TEXTS:
                raise RequestError(f"structured_outputs: the lengths of all strings add up to more than {TEXTS}: leave some out")
            self.texts[pattern] = f"text{len(self.texts)}"
            self.definitions[self.texts[pattern]] = {"type": "string", "pattern": self.marked(pattern)}
        return {"$ref": f"#/$defs/{self.texts[pattern]}"}

    def marked(self, pattern: str) -> str:
        return self.patterns.setdefault(pattern, mark(len(self.patterns)))

    def array(self, given: Schema, path: str) -> Schema:
        least, most = count(given, "minItems", path), count(given, "maxItems", path)
        items, first = given.get("items", True), given.get("prefixItems", [])
        if isinstance(items, list):
            raise refusal("items as a list", path, "write prefixItems")
        if most is not None and most <= len(first):
            first, items = first[:most], False
        made: Schema = {"type": "array", "minItems": least or 0}
        if first:
            made["prefixItems"] = [self.lower(part, f"{path}/prefixItems/{number}") for number, part in enumerate(first)]
        made["items"] = False if items is False else self.lower(items, f"{path}/items")
        if most is not None and items is not False:
            made["maxItems"] = most
        return made

    def object(self, given: Schema, path: str) -> Schema:
        further, patterns = given.get("additionalProperties", True), given.get("patternProperties", {})
        properties, required = dict(given.get("properties", {})), list(given.get("required", []))
        for name in required:
            if name not in properties:
                if patterns or further is False:
                    raise refusal(f"required = {name!r} without a property of that name", path, "describe it in properties")
                properties[name] = further
        counts = {name: count(given, name, path) for name in ("minProperties", "maxProperties")}
        most = COUNTED if any(counts.values()) else PROPERTIES
        if len(properties) > most:
            raise refusal(f"an object of {len(properties)} properties", path, f"at most {most}")
        made: Schema = {"type": "object", "required": required, "additionalProperties": False}
        made["properties"] = {n: self.lower(part, f"{path}/properties/{n}") for n, part in properties.items()}
        if patterns:
            made["patternProperties"] = self.by_pattern(patterns, further, properties, path)
        elif further is not False:
            self.excepted += sum(map(len, properties))
            if self.excepted > EXCEPTED:
                raise refusal("further keys beside so many properties", path, "write additionalProperties: false")
            made["patternProperties"] = {
                self.marked(json_except(properties)): self.lower(further, f"{path}/additionalProperties")
            }
        made.update({name: value for name, value in counts.items() if value is not None})
        return made

    def by_pattern(self, patterns: Mapping[str, Any], further: Any, names: Iterable[str], path: str) -> Schema:
        if len(patterns) > 1 or further is not False:
            raise refusal(
                "patternProperties of several patterns, or with further keys", path, "write one, additionalProperties: false"
            )
        ((pattern, part),) = patterns.items()
        written = json_pattern_at(pattern, f"{path}/patternProperties")[0]
        for name in names:
            if re.search(pattern, name):
                raise refusal(f"a property {name!r} that patternProperties match too", path, "leave one of them out")
        return {self.marked(written): self.lower(part, f"{path}/patternProperties/{pattern}")}


# ---- without a state


def named_types(types: Any, path: str) -> list[str]:
    """All of them when none is named."""
    named = list(TYPES) if types is None else [types] if isinstance(types, str) else types
    if not isinstance(named, list) or not named or not set(named) <= {*TYPES, "integer"}:
        raise RequestError(f"structured_outputs: type = {types!r} (at {path}) is not one of {', '.join((*TYPES, 'integer'))}")
    return [kind for kind in named if kind != "integer" or "number" not in named]


def one_of(schemas: list[Schema]) -> Schema:
    return schemas[0] if len(schemas) == 1 else {"anyOf": schemas}


def keyed(patterns: Schema) -> Schema:
    return {"type": "object", "patternProperties": patterns, "additionalProperties": False}


def literal(value: Any, path: str) -> Schema:
    """A constant, with the spacing of all other JSON."""
    if isinstance(value, Mapping):
        parts = {name: literal(part, path) for name, part in value.items()}
        return {"type": "object", "properties": parts, "required": list(parts), "additionalProperties": False}
    if isinstance(value, list):
        parts = [literal(part, path) for part in value]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    if isinstance(value, (int, float)) and not (isfinite(value) and abs(value) < 2**63):
        raise refusal(f"the number {value}", path, "write one of at most 63 bits")
    return {"const": value}


def json_pattern_at(pattern: str, path: str) -> tuple[str, float, float]:
    try:
        return json_pattern(pattern)
    except (Unsupported, re.error, RecursionError) as error:
        raise RequestError(f"structured_outputs: the pattern {pattern[:100]!r} (at {path}) cannot be used: {error}") from error


def bound(given: Schema, name: str, path: str) -> Any:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise RequestError(f"structured_outputs: {name} (at {path}) has to be a number")
    return value


def number(given: Schema, path: str) -> Schema:
    made: Schema = {"type": "number"}
    for name in BY_TYPE["number"]:
        value = bound(given, name, path)
        if value is None:
            continue
        if name == "multipleOf":
            raise refusal("multipleOf of a number", path, 'write type "integer"')
        if abs(value) > LARGEST or round(value, DIGITS) != value:
            raise refusal(
                f"{name} = {value}", path, f"bounds have at most {DIGITS} digits after the point and are below {LARGEST}"
            )
        made[name] = value
    return made


def integer(given: Schema, path: str) -> Schema:
    """With inclusive bounds."""
    low, high, step = (bound(given, name, path) for name in ("minimum", "maximum", "multipleOf"))
    under, over = bound(given, "exclusiveMinimum", path), bound(given, "exclusiveMaximum", path)
    lows = [*([ceil(low)] if low is not None else []), *([floor(under) + 1] if under is not None else [])]
    highs = [*([floor(high)] if high is not None else []), *([ceil(over) - 1] if over is not None else [])]
    made: Schema = {"type": "integer"}
    made |= {"minimum": max(lows)} if lows else {}
    made |= {"maximum": min(highs)} if highs else {}
    for name in ("minimum", "maximum"):
        if abs(made.get(name, 0)) >= 2**63:
            raise refusal(f"{name} of an integer beyond 63 bits", path, "leave it out")
    if step is not None:
        wide = len(made) == 2 or (len(made) == 3 and made["maximum"] - made["minimum"] >= RANGE)
        if step != floor(step) or not 0 < step <= MULTIPLE or wide:
            advice = f"it can be a whole number up to {MULTIPLE}, with both bounds (at most {RANGE} apart) or none"
            raise refusal(f"multipleOf = {step}", path, advice)
        made["multipleOf"] = int(step)
    return made


def count(given: Schema, name: str, path: str) -> int | None:
    value = given.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != floor(value) or value < 0:
        raise RequestError(f"structured_outputs: {name} (at {path}) has to be a whole number of at least 0")
    most = LENGTH if name.endswith("Length") else ITEMS
    if value > most:
        raise refusal(f"{name} = {value}", path, f"at most {most}; or leave it out")
    return int(value)
