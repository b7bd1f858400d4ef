"""What the back ends promise, without a model: tokens drawn at random from their masks make what other libraries accept. And what
they cannot take, or nobody could, fails alone."""

from __future__ import annotations

import pytest
from guided_schemas import schemas
from guided_walks import BOTH, ended, needs_xgrammar, source

from kernel_core import Engine, RequestError

pytest.importorskip("llguidance")
INTEGER, DIGIT = {"type": "integer"}, {"type": "integer", "minimum": 0, "maximum": 9}
CLOSED = {"type": "object", "additionalProperties": False}
SHORT = {"type": "string", "maxLength": 3}
KEYWORDS = {
    "pattern anywhere, with a length": {"type": "string", "pattern": "ab+", "maxLength": 6},
    "pattern of a beginning": {"type": "string", "pattern": "^a", "maxLength": 9},
    "pattern classes": {"type": "string", "pattern": r"^\d\w\s.[^a]\/\-$"},
    "pattern and enum": {"enum": ["abc", "xyz"], "type": "string", "pattern": "^a"},
    "lengths": {"type": "string", "minLength": 3, "maxLength": 5},
    "patternProperties": CLOSED | {"patternProperties": {"^x_": INTEGER}, "maxProperties": 2},
    "additionalProperties": {
        **{"type": "object", "properties": {"a": SHORT}, "required": ["a"]},
        **{"additionalProperties": DIGIT, "maxProperties": 2},
    },
    "required but not described": {"type": "object", "required": ["z"], "properties": {"a": {"type": "boolean"}}},
    "minProperties": {"type": "object", "minProperties": 1, "maxProperties": 2, "additionalProperties": DIGIT},
    "allOf of objects": {
        "allOf": [{"type": "object", "properties": {"a": DIGIT}, "required": ["a"]}, {"properties": {"b": DIGIT}}],
        "additionalProperties": DIGIT,
    },
    "allOf of bounds": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 7}]},
    "anyOf beside": {
        **{"type": "object", "properties": {"a": DIGIT}, "required": ["a"], "additionalProperties": DIGIT, "maxProperties": 3},
        "anyOf": [{"required": ["b"]}, {"required": ["c"]}],
    },
    "oneOf of types": {"oneOf": [DIGIT, {"type": "boolean"}]},
    "multipleOf": {"type": "integer", "multipleOf": 7, "minimum": -30, "maximum": 30},
    "number": {"type": "number"},
    "exclusive bounds": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "exclusive bounds of integers": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 3},
    "large bounds": {"type": "integer", "minimum": -(10**18), "maximum": 10**18},
    "enum of all types": {"enum": [1, 1.5, "a", None, True, [1, 2], {"a": 1}]},
    "const": {"const": {"a": [1, 2, {"b": None}]}},
    "prefixItems": {"type": "array", "prefixItems": [DIGIT, {"type": "boolean"}], "maxItems": 4, "items": {"type": "null"}},
    "types": CLOSED | {"type": ["object", "null"], "properties": {"a": DIGIT}},
    "definitions": {"definitions": {"a": DIGIT}, "type": "array", "items": {"$ref": "#/definitions/a"}, "maxItems": 3},
    "a reference and a keyword": {"$defs": {"a": {"type": "integer", "minimum": 1}}, "$ref": "#/$defs/a", "maximum": 5},
    "components": {"components": {"schemas": {"Pet": DIGIT}}, "$ref": "#/components/schemas/Pet"},
    "keys that JSON escapes": CLOSED
    | {"properties": {'a"b\\\n': DIGIT, "é": {"const": "😀\u2028"}}, "required": ['a"b\\\n', "é"]},
    "a key named as a keyword": CLOSED | {"properties": {"not": DIGIT, "maximum": DIGIT}, "required": ["not"]},
    "anything": {},
}


#: what xgrammar refuses of the above, and of the real-world shapes
UNLIKE = {
    "pattern anywhere, with a length": "maxLength beside a pattern",
    "pattern of a beginning": "maxLength beside a pattern",
    "pattern and enum": "pattern beside enum",
    "allOf of objects": "additionalProperties beside allOf",
    "allOf of bounds": "allOf of several",
    "anyOf beside": "type beside anyOf",
    "a reference and a keyword": "maximum beside",
    **{f"packages {n}": "maxLength beside a pattern" for n in (0, 1)},
    **{f"user {n}": "maxLength beside a format" for n in range(18)},
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_that_is_taken_is_honoured(name):
    assert ended("llguidance", KEYWORDS[name], 8)


@needs_xgrammar
@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_is_honoured_or_refused_by_xgrammar(name):
    if name in UNLIKE:
        with pytest.raises(RequestError, match=UNLIKE[name]):
            source("xgrammar", "json_schema", KEYWORDS[name])
    else:
        assert ended("xgrammar", KEYWORDS[name], 8)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BOTH)
def test_every_schema_whatever_is_drawn(backend):
    chosen = [*KEYWORDS.items(), *schemas()]
    if backend == "xgrammar":
        for name, schema in chosen:
            if name in UNLIKE:
                with pytest.raises(RequestError, match=UNLIKE[name]):
                    source(backend, "json_schema", schema)
        chosen = [item for item in chosen if item[0] not in UNLIKE]
    assert all(ended(backend, schema, 12) for _, schema in chosen)


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("json_schema", {"$ref": "#/x/y", "x": {"y": {"type": "number", "maximum": 2.25}}}, r"maximum = 2.25 \(at #/x/y\)"),
        ("json_schema", {"type": "array", "items": [{"type": "array", "uniqueItems": True}]}, r"uniqueItems \(at #/items/0\)"),
        ("json_schema", {"type": "string", "format": "colour"}, "colour"),
        ("json_schema", {"type": "string", "pattern": "^(?=a)"}, "look-around"),
        ("json_schema", {"type": "object", "properties": ["a"]}, "properties"),
        ("json_schema", {"minProperties": "a"}, "cannot be read"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ("json_schema", '{"items":' * 20_000, "recursion"),
        ("regex", "(" * 9000 + ")" * 9000, "regex"),
        ("grammar", "start: " + "(" * 9000 + '"a"' + ")" * 9000, "deeply nested"),
        ("grammar", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000, "recursion"),
        ("grammar", 'start: %json {"type": "array", "uniqueItems": true}', "uniqueItems"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_read_or_honoured_is_refused(kind, value, says):
    with pytest.raises(RequestError, match=says):
        source("llguidance", kind, value)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("depth", [300, 20_000])
def test_a_schema_that_is_too_deep_is_refused(depth, backend):
    schema: dict = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match=r"recursion|nested"):
        source(backend, "json_schema", schema, most=1 << 30)


HOSTILE = {
    "a reference to itself": {"json": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}},
    "a rule of itself": {"grammar": "start: start"},
    "no such token": {"grammar": "start: <nosuch>"},
    "no text": {"regex": "[^\\x00-\\U0010FFFF]"},
    "a million of a": {"regex": "(a{1000}){1000}"},
}
HUGE = {
    "huge length": {"json": {"type": "string", "maxLength": 10**9}},
    "ambiguous": {"grammar": 'start: start start | "a" | start start start | ""'},
    "many choices": {"choice": [f"word{number} and more" for number in range(8000)]},
}


@pytest.mark.slow
def test_grammars_that_lead_nowhere_or_are_huge_fail_alone():
    keys = dict(model="tiny-chat", device="cpu", dtype="float32", max_requests=16, max_model_len=128)
    outputs = {}
    with Engine(**keys, plugins={"guided_decoding": {}}) as engine:
        for name, form in {**HOSTILE, **HUGE, "free": None}.items():
            given = engine.intake.params(max_tokens=16, temperature=0.0, structured_outputs=form)
            engine.add_request(name, "Hi", given)
        while engine.has_unfinished_requests():
            outputs.update((output.request_id, output) for output in engine.step())
        engine.core.scheduler.check()
    assert {name for name, output in outputs.items() if output.error} == set(HOSTILE)
    assert outputs["many choices"].outputs[0].text in HUGE["many choices"]["choice"]
