"""Outputs follow their grammar: judged by jsonschema, re and lark, which the plugin does not use."""

from __future__ import annotations

import json
import re

import jsonschema
import lark
import pytest
from guided_schemas import schemas
from guided_walks import BOTH
from test_guided_backend import UNLIKE

from kernel_core import LLM, RequestError, SamplingParams

pytest.importorskip("llguidance")
MODEL, PROMPT = "tiny-chat", "What does os.path.join do?"
SQL_EBNF = """root ::= select
select ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 " | "table_2 "
condition ::= column "= " number
number ::= "1 " | "2 "
"""
SQL_LARK = """start: "SELECT " column " from " table " where " column "= " number
column: "col_1 " | "col_2 "
table: "table_1 " | "table_2 "
number: "1 " | "2 "
"""


@pytest.fixture(scope="module", params=BOTH)
def llm(request):
    plugins = {"guided_decoding": {"backend": request.param}}
    with LLM(MODEL, device="cpu", dtype="float32", max_requests=32, max_model_len=640, plugins=plugins) as llm:
        llm.backend = request.param
        yield llm


@pytest.fixture
def llguidance(llm):
    if llm.backend != "llguidance":
        pytest.skip("of llguidance only: the same of xgrammar is in test_guided_xgrammar.py")
    return llm


def params(constraint, **given):
    return SamplingParams.of(**{"max_tokens": 400, "seed": 1, "temperature": 0.0, "structured_outputs": constraint, **given})


def complete(llm, constraints, **given):
    return mixed(llm, [params(c, **given) for c in constraints])


def mixed(llm, given):
    outputs = llm.generate([PROMPT] * len(given), given)
    for output in outputs:
        assert output.error is None, output.error
    return [output.outputs[0] for output in outputs]


def at_both(constraints, **given):
    """Greedy and hot, in one batch."""
    return [params(c, temperature=t, **given) for t in (0.0, 1.5) for c in constraints]


def all_valid(llm, chosen, given) -> int:
    """How many were finished; each of these is valid."""
    finished = 0
    for (name, schema), output in zip(chosen, mixed(llm, given)):
        if output.finish_reason == "stop":
            finished += 1
            jsonschema.validate(json.loads(output.text), schema)
        else:
            assert output.finish_reason == "length", name
    return finished


def test_json_of_real_world_schemas_is_valid(llm):
    chosen = [item for item in schemas() if item[0] in ("tool_call 0", "tree 1", "review 2")] * 2
    given = at_both([{"json": schema} for _, schema in chosen[:3]], max_tokens=80)
    assert all_valid(llm, chosen, given) >= 4


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_json_of_all_schemas_is_valid(llm, temperature):
    chosen = [item for item in schemas() if llm.backend == "llguidance" or item[0] not in UNLIKE]
    assert len(chosen) >= (200 if llm.backend == "llguidance" else 196)
    finished = all_valid(llm, chosen, [params({"json": schema}, temperature=temperature) for _, schema in chosen])
    print(f"{finished} of {len(chosen)} finished, all valid")
    assert finished >= 0.6 * len(chosen)


def test_choices_and_expressions(llm):
    choices = [["Positive", "Negative"], ["Pos", "Positive"], ['a "quoted"\nline', "é😀", "\\"]]
    patterns = [r"[a-z]{1,9}@[a-z]{1,9}\.com\n", r"^(ab|c){1,3}d$", r"\d{4}-\d{2}", r"[^x]{3}", r"\S\s[\W]"]
    patterns += [r"(?i)yes|no"] if llm.backend == "llguidance" else []
    given = [*({"choice": c} for c in choices), *({"regex": p} for p in patterns)]
    for constraint, output in zip(given * 2, mixed(llm, at_both(given))):
        assert output.finish_reason == "stop"
        if "choice" in constraint:
            assert output.text in constraint["choice"]
        else:
            assert re.fullmatch(constraint["regex"], output.text)


def test_grammars_of_both_kinds(llm):
    parser = lark.Lark(SQL_LARK)
    for output in mixed(llm, at_both([{"grammar": SQL_EBNF}, {"grammar": SQL_LARK}])):
        parser.parse(output.text)
        assert output.finish_reason == "stop"
    nested = 'start: "(" inner ")" | "x"\ninner: "[" start "]" | "y"'
    for output in mixed(llm, at_both([{"grammar": nested}], max_tokens=20)):
        if output.finish_reason == "stop":
            lark.Lark(nested).parse(output.text)


def test_structured_parts_begin_with_a_trigger(llm):
    """The model is pushed to begin a part; inside it, only the schema counts."""
    schema = {"type": "object", "properties": {"name": {"const": "f"}}, "required": ["name"], "additionalProperties": False}
    tag = {"structures": [{"begin": "<tool_call>", "schema": schema, "end": "</tool_call>"}], "triggers": ["<tool_call>"]}
    (output,) = complete(llm, [{"structural_tag": tag}], logit_bias={4092: 100.0}, max_tokens=20)
    assert output.text.startswith('<tool_call>{"name": "f"}</tool_call>')


@pytest.mark.parametrize(
    ("whitespace", "wanted"), [("compact", '{"a":[1,1]}'), ("spaced", '{"a": [1, 1]}'), (None, '{"a": [1, 1]}')]
)
def test_whitespace_as_asked(llguidance, whitespace, wanted):
    ones = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}
    schema = {"type": "object", "properties": {"a": ones}, "required": ["a"], "additionalProperties": False}
    (output,) = complete(llguidance, [{"json": schema, "whitespace": whitespace}])
    assert output.text == wanted


def test_a_stop_token_comes_only_where_the_grammar_accepts(llm):
    """The bias makes it by far the most likely token at every place."""
    (output,) = complete(llm, [{"regex": "(ab){3}"}], stop_token_ids=[300], logit_bias={300: 100.0})
    assert (output.finish_reason, output.stop_reason) == ("stop", 300) and output.text.startswith("ababab")
    assert 300 not in output.token_ids[:-1]


@pytest.mark.parametrize(
    ("constraint", "says"),
    [
        ({"choice": ["a"], "regex": "b"}, "exactly one"),
        ({}, "exactly one"),
        ({"regex": "("}, "regex"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"grammar": "start: missing"}, "missing"),
        ({"grammar": "root ::= ("}, "grammar"),
        ({"json": "{"}, "json_schema"),
        ({"json": {"type": "strnig"}}, "strnig"),
        ({"json": {"properties": {"a": {"uniqueItems": True}}}}, r"uniqueItems \(at #/properties/a\)"),
        ({"json": {"contains": {"type": "integer"}}}, "contains"),
        ({"json": {"not": {}}}, "not "),
        ({"json": {"if": {}}}, "if "),
        ({"json": {"type": "number", "maximum": 2.25}}, "maximum = 2.25"),
        ({"json": {"$ref": "http://example.com/x"}}, "example.com"),
        ({"json": {"properties": {"a": {"oneOf": [{}, {"type": "null"}]}}}}, r"several alternatives .* \(at #/properties/a\)"),
        ({"json": {"type": "string", "description": "x" * 300_000}}, "max_bytes"),
        ({"structural_tag": {"structures": [{"begin": "<a", "schema": {}, "end": ""}], "triggers": ["<b"]}}, "trigger"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(llguidance, constraint, says):
    with pytest.raises(RequestError, match=says):
        llguidance.generate(PROMPT, params(constraint))


def test_ignore_eos_is_refused(llguidance):
    with pytest.raises(RequestError, match="ignore_eos"):
        llguidance.generate(PROMPT, params({"choice": ["a"]}, ignore_eos=True))


def test_unguided_requests_beside_guided_ones_are_unchanged(llm):
    free = params(None, temperature=0.9, max_tokens=24)
    (alone,) = llm.generate([PROMPT], [free])
    mixed = llm.generate([PROMPT] * 3, [params({"choice": ["Positive"]}), free, params({"json_object": True}, max_tokens=24)])
    assert mixed[1].outputs[0].token_ids == alone.outputs[0].token_ids
    assert mixed[0].outputs[0].text == "Positive"
