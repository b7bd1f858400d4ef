"""What the back end promises, without a model: tokens drawn at random from its masks make what other libraries accept. And what
it cannot take, or nobody could, fails alone."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from guided_schemas import schemas

from kernel_core import Engine, RequestError

llguidance = pytest.importorskip("llguidance")
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


@cache
def tokenizer():
    from kernel_guided_decoding.compiler import load_tokenizer
    from tokenizers import Tokenizer

    folder = Path(str(files("kernel_tiny"))) / "tiny-chat"
    config = json.loads((folder / "config.json").read_text())
    ends = np.atleast_1d(config["eos_token_id"]).tolist()
    file, size = folder / "tokenizer.json", config["vocab_size"]
    return load_tokenizer(file, size, ends), Tokenizer.from_file(str(file)), ends, size


def walk(schema, draw: np.random.Generator, most: int = 200) -> str | None:
    """A text of tokens drawn evenly from the masks, half of them from the first 600, which are letters; None: it did not end."""
    from kernel_guided_decoding.sources import check, limits, source

    grammar = source("json_schema", schema, "spaced", 1 << 18, lambda text: False)
    check(grammar)
    table, names, ends, size = tokenizer()
    matcher, words, out = llguidance.LLMatcher(table, grammar, limits=limits()), np.zeros((1, (size + 31) // 32), np.int32), []
    for _ in range(most):
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")[:size])
        if allowed[0] < 600 and draw.random() < 0.5:
            allowed = allowed[allowed < 600]
        if set(ends) & set(allowed.tolist()) and draw.random() < 0.4:
            return names.decode(out, skip_special_tokens=False)
        token = int(draw.choice(allowed))
        if token in ends:
            return names.decode(out, skip_special_tokens=False)
        assert matcher.consume_token(token), matcher.get_error()
        out.append(token)
    return None


def ended(schema, walks: int) -> int:
    """How many walks ended; each of these is valid."""
    draw = np.random.default_rng(1)
    texts = [text for text in (walk(schema, draw) for _ in range(walks)) if text is not None]
    for text in texts:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    return len(texts)


@pytest.mark.parametrize("name", KEYWORDS)
def test_every_keyword_that_is_taken_is_honoured(name):
    assert ended(KEYWORDS[name], 12)


@pytest.mark.slow
def test_every_schema_whatever_is_drawn():
    assert all(ended(schema, 12) for _, schema in schemas())


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
    from kernel_guided_decoding.sources import check, source

    with pytest.raises(RequestError, match=says):
        check(source(kind, value, "spaced", 1 << 18, lambda text: False))


@pytest.mark.parametrize("depth", [300, 20_000])
def test_a_schema_that_is_too_deep_is_refused(depth):
    from kernel_guided_decoding.sources import check, source

    schema: dict = {}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="recursion"):
        check(source("json_schema", schema, "spaced", 1 << 30, lambda text: False))


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
