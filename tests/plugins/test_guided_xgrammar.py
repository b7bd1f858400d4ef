"""The back end xgrammar: what reaches it is rewritten, so the rewriting is judged by `re`; what it would not do is refused by
name; and where both back ends take a grammar, they take the same texts."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from guided_schemas import schemas
from guided_walks import accepts, matcher, source, tokenizer, walk
from test_guided_backend import HOSTILE, KEYWORDS, UNLIKE

from kernel_core import LLM, Engine, PluginError, RequestError

pytest.importorskip("xgrammar")
PATTERNS = [
    r"^$",
    r"ab+",
    r"^ab|c$",
    r"a$|^b",
    r"(^a|b)c",
    r"a(b|c$)",
    r"^[^\s]\S[\S\d]$",
    r"^\w\d\s\W\D$",
    r"^[\s\S]{2}$",
    r"^.[^a-y].?$",
    r'^"\\\n\x00$',
    r"^[\"\\/\t-\x1f]{1,2}$",
    r"^[é-ÿ\x41\u20ac😀]{1,2}$",
    r"^(?:a{2,3}|(b?)*c{2,})$",
    r"^a*?b+?$",
    r"",
]
ALPHABET = [*'abcAyz019_ "\\/\n\t\r\x00\x1f\x7f-', "é", "ÿ", "€", "😀", "\u00a0", "\u2028", "\u0661"]
#: Python says yes, ECMA 262 no, and so the rewritten class says no
EITHER = "\u0661é\u00a0ÿ"


def texts(count: int):
    draw = np.random.default_rng(5)
    yield ""
    for _ in range(count):
        yield "".join(draw.choice(ALPHABET, int(draw.integers(1, 6))))


def words():
    """Random texts, and such that fit some of the patterns."""
    yield from texts(80)
    yield from ("aab", "aaacc", "é€", "zz", "a1 -b", '"\\\n\x00', "aabb", "cc")
    yield from (
        "ab",
        "abb",
        "xabx",
        "c",
        "xc",
        "cx",
        "ac",
        "bc",
        "a",
        "b",
        "aab",
        "aaacc",
        "é€",
        "zz",
        "a1 -b",
        '"\\\n\x00',
        "aabb",
        "cc",
    )


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_means_what_it_means_to_re(pattern):
    """As a JSON pattern, found anywhere, and as a regex, of the whole text; `json` writes every character as it has to be."""
    found = 0
    as_json, as_text = matcher("xgrammar", "json_schema", {"type": "string", "pattern": pattern}), None
    if pattern:
        as_text = matcher("xgrammar", "regex", pattern) if "(^" not in pattern and "c$)" not in pattern else None
    for text in words():
        if set(text) & set(EITHER) and re.search(r"\\[wdsWDS]", pattern):
            continue
        taken = follows(as_json.copy(), json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f"))
        assert taken == bool(re.search(pattern, text)) or text.endswith("\n"), text
        found += taken
        if as_text is not None and text:
            assert follows(as_text.copy(), text) == bool(re.fullmatch(pattern, text)), text
    assert found


def follows(matcher, text: str) -> bool:
    ids = tokenizer()[1].encode(text).ids
    return all(matcher.try_advance(token) for token in ids) and matcher.accepting()


@pytest.mark.parametrize(
    ("kind", "value", "says"),
    [
        ("regex", r"(?=a)a", "look-around"),
        ("regex", r"(a)\1", "back reference"),
        ("regex", r"a\b", "anchor"),
        ("regex", r"a^b", "anchor"),
        ("regex", "(?i)a", "flags"),
        ("regex", "(?>a)", "atomic"),
        ("regex", "(", "unterminated"),
        ("regex", r"[^\s\S]", "no character"),
        ("regex", "(" * 9000 + ")" * 9000, "recursion"),
        ("regex", "a{2000000}", "repeats more than"),
        ("json_schema", {"type": "string", "pattern": r"^\p{L}$"}, r"bad escape \\p"),
        ("json_schema", {"type": "string", "pattern": "^(?!a)"}, r"look-around .*|\(at #\)"),
        ("json_schema", {"properties": {"a": {"uniqueItems": True}}}, r"uniqueItems \(at #/properties/a\)"),
        ("json_schema", {"not": {}}, "not "),
        ("json_schema", {"type": "number", "multipleOf": 0.5}, "multipleOf"),
        ("json_schema", {"type": "integer", "multipleOf": 7, "minimum": 0}, "multipleOf"),
        ("json_schema", {"type": "number", "maximum": 0.12345678}, "maximum = 0.12345678"),
        ("json_schema", {"type": "integer", "maximum": 2**70}, "maximum of an integer"),
        ("json_schema", {"const": 2**70}, "the number"),
        ("json_schema", {"type": "string", "format": "colour"}, "colour"),
        ("json_schema", {"type": "string", "format": "date", "maxLength": 3}, "maxLength beside a format"),
        ("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, r"several alternatives .*\(at #\)"),
        ("json_schema", {"type": "array", "items": [{}]}, "prefixItems"),
        (
            "json_schema",
            {"patternProperties": {"^a": {}, "b": {}}, "additionalProperties": False},
            "patternProperties of several",
        ),
        ("json_schema", {"patternProperties": {"^a": {}}}, "patternProperties of several patterns, or with further"),
        (
            "json_schema",
            {"properties": {"ab": {}}, "patternProperties": {"^a": {}}, "additionalProperties": False},
            "a property 'ab' that patternProperties",
        ),
        ("json_schema", {"required": ["a"], "additionalProperties": False}, "required = 'a'"),
        ("json_schema", {"$ref": "http://example.com/x"}, "example.com"),
        ("json_schema", {"$ref": "#/$defs/no"}, "leads nowhere"),
        ("json_schema", HOSTILE["a reference to itself"]["json"], "leads back to itself"),
        ("json_schema", {"type": "strnig"}, "strnig"),
        ("json_schema", {"type": "string", "maxLength": 10**9}, "maxLength = 1000000000"),
        ("json_schema", {"properties": {f"key number {n}": {} for n in range(300)}}, "further keys beside so many"),
        ("json_schema", {"properties": {str(n): {} for n in range(501)}}, "an object of 501 properties"),
        ("json_schema", {"properties": {str(n): {} for n in range(65)}, "maxProperties": 3}, "of 65 properties"),
        ("json_schema", {"anyOf": [{"type": "string", "maxLength": n} for n in range(900, 930)]}, "lengths of all strings"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "minimum greater than maximum"),
        ("json_schema", {"properties": {"a": False}}, "false"),
        ("json_schema", "{", "json_schema"),
        ("json_schema", '{"const": Infinity}', "the number|cannot be read"),
        ("grammar", 'start: %json {"type": "array"}', "%json"),
        ("grammar", "start[max_tokens=3]: /a*/", "attributes"),
        ("grammar", r"start: /\D/", r"\\D"),
        ("grammar", "start: /(?=a)a/", "Lookahead"),
        ("grammar", "start: missing", "missing"),
        ("grammar", "start: " + "(" * 9000 + '"a"' + ")" * 9000, "structured_outputs"),
        ("grammar", 'root ::= Regex("a(?=b)b")', "Regex"),
        ("grammar", "root ::= (", "EBNF"),
        ("grammar", "root ::= " + "(" * 9000 + '"a"' + ")" * 9000, "structured_outputs"),
        ("structural_tag", {"structures": [{"begin": "<|user|>", "schema": {}, "end": ""}], "triggers": ["<|user|>"]}, "special"),
        ("structural_tag", {"structures": [{"begin": "<a", "schema": {}, "end": ""}], "triggers": ["<b"]}, "trigger"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_it_would_not_do_is_refused_by_name(kind, value, says):
    with pytest.raises(RequestError, match=says):
        source("xgrammar", kind, value)


LINK = {"type": "object", "properties": {"n": {"$ref": "#/$defs/link"}}, "additionalProperties": False}
CHAIN = {"$defs": {"link": LINK}, "$ref": "#/$defs/link"}
#: valid, and not: more than the keywords of the back ends' common tests
MEANT = [
    ({"oneOf": [{"type": "integer"}, {"const": "a"}, {"type": "null"}]}, ["1", '"a"', "null"], ['"b"', "true"]),
    ({"allOf": [{"$ref": "#/$defs/a~1b"}], "$defs": {"a/b": {"const": 5}}}, ["5"], ["6"]),
    ({"type": ["integer", "string"], "minimum": 3, "maxLength": 1}, ["3", '"a"'], ["2", '"aa"']),
    ({"properties": {"a": {"type": "null"}}}, ['{"a": null}', '{"b": 1}', "5", '"x"'], ['{"a": 1}']),
    ({"type": "object", "properties": {"a": {"type": "null"}}}, ['{"ab": 1}', '{"": 1}'], ['{"a": 1}', '{"\\u0061": 1}']),
    ({"type": "integer", "minimum": 2.5, "exclusiveMaximum": 5}, ["3", "4"], ["2", "5"]),
    ({"type": "number", "minimum": -1.25, "maximum": 2.25}, ["-1.25", "2.2", "2.25", "0"], ["-1.26", "2.26", "3"]),
    ({"type": "array", "prefixItems": [{"const": 1}, {"const": 2}], "maxItems": 1}, ["[]", "[1]"], ["[2]", "[1, 2]"]),
    (
        {"type": "string", "minLength": 2, "maxLength": 2},
        ['"\\n\\""', '"é😀"', '"\\u0001a"'],
        ['"a"', '"\t\t"', '"\\ud83d\\ude00"'],
    ),
    ({"enum": [1, 1.0, "1", True, {"a": [1, {}]}], "type": ["number", "object"]}, ["1", '{"a": [1, {}]}'], ['"1"', "true"]),
    ({"type": "string", "format": "date"}, ['"2024-02-28"'], ['"2024-02-30"', '"2024-13-01"']),
    ({"type": "string", "format": "email"}, ['"a.b@c-d.org"'], ['"a b@c"', '"@c"']),
    (
        {
            "$defs": {"n": {"properties": {"n": {"$ref": "#/$defs/n"}}, "type": "object", "additionalProperties": False}},
            "$ref": "#/$defs/n",
        },
        ['{"n": {"n": {}}}'],
        ['{"m": 1}'],
    ),
    ({"type": "array", "items": {"$ref": "#"}, "maxItems": 2}, ["[[], [[]]]"], ["[1]"]),
    (CHAIN, ['{"n": {"n": {}}}'], ['{"m": 1}', '{"n": 1}']),
]


@pytest.mark.parametrize(("schema", "good", "bad"), MEANT, ids=lambda value: str(value)[:50])
def test_what_a_schema_means(schema, good, bad):
    begin = matcher("xgrammar", "json_schema", schema)
    assert [text for text in good if not follows(begin.copy(), text)] == []
    assert [text for text in bad if follows(begin.copy(), text)] == []


@pytest.mark.parametrize(
    ("spacing", "good"),
    [("compact", '{"a":[1,1],"b":{}}'), ("spaced", '{"a": [1, 1], "b": {}}'), ("flexible", '{"a" :[ 1,1 ] , "b":{ }}')],
)
def test_spacing_as_asked(spacing, good):
    assert accepts("xgrammar", "json_schema", {"const": {"a": [1, 1], "b": {}}}, good, spacing)


def test_special_tokens_are_no_text():
    begin = matcher("xgrammar", "regex", r"<\|user\|>x")
    assert not begin.copy().try_advance(tokenizer()[1].token_to_id("<|user|>"))
    assert (
        all(begin.try_advance(token) for byte in "<|user|>x" for token in tokenizer()[1].encode(byte).ids) and begin.accepting()
    )


#: as UTF-8 would write them, and must not: a surrogate, too long forms, what is beyond Unicode, and parts
MALFORMED = [
    b"\xed\xa0\x80",
    b"\xc0\xa2",
    b"\xe0\x80\x80",
    b"\xe0\x9f\xbf",
    b"\xf0\x80\x80\x80",
    b"\xf4\x90\x80\x80",
    b"\xff",
    b"\x80",
    b"\xe2\x82",
]


def of_bytes(data: bytes) -> list[int]:
    """Tokens of one byte each: byte-level vocabularies spell what is not printed as Latin-1 by letters from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [tokenizer()[1].token_to_id(chr(byte if byte in shown else 256 + hidden.index(byte))) for byte in data]


@pytest.mark.parametrize("unit", [r"[^x]", r"[\s\S]", r".", r"[\W\w]", r"[^\s]"])
def test_bytes_that_are_no_utf_8_are_no_character(unit):
    for kind, value in (("regex", unit), ("json_schema", {"type": "string", "pattern": f"^{unit}$"})):
        quote = b"" if kind == "regex" else b'"'
        begin = matcher("xgrammar", kind, value)
        for data in (*MALFORMED, *(letter.encode() for letter in "aé\u0800\u0fff\ud7ff\ue000\uffff😀\U0010ffff")):
            at = begin.copy()
            taken = all(at.try_advance(token) for token in of_bytes(quote + data + quote)) and at.accepting()
            assert taken == (data not in MALFORMED), (kind, data)


def test_classes_have_their_characters_and_no_others():
    """Random ranges, at their ends and beside them."""
    draw = np.random.default_rng(7)
    for _ in range(12):
        points = sorted({int(2 ** draw.uniform(5, 20)) for _ in range(6)} - set(range(0xD7F0, 0xE010)))
        pairs = [*zip(points[::2], points[1::2])]
        pairs = [(a, b) for a, b in pairs if not a < 0xD800 <= b]
        written = "".join(f"\\U{a:08x}-\\U{b:08x}" for a, b in pairs)
        for pattern in (f"[{written}]", f"[^{written}]"):
            begin = matcher("xgrammar", "regex", pattern)
            for text in {chr(edge + step) for pair in pairs for edge in pair for step in (-1, 0, 1)}:
                assert follows(begin.copy(), text) == bool(re.fullmatch(pattern, text)), (pattern, text)


# ---- the same as the other back end

#: where they differ on purpose: in words, and how a text shows it
APART = {
    "minus zero of an integer": re.compile(r"-0(?![\d.])"),
    "digits of a number with bounds": re.compile(r"\.\d"),
}
SAME = [name for name in KEYWORDS if name not in UNLIKE]


def both_ways(kind, value, walks=2, most=100) -> int:
    """Walks of each back end are followed by the other: it takes every token, and may end where the first may → their tokens."""
    pytest.importorskip("llguidance")
    names, count = tokenizer()[1], 0
    for backend, other in (("xgrammar", "llguidance"), ("llguidance", "xgrammar")):
        draw, begin, beside = np.random.default_rng(2), matcher(backend, kind, value), matcher(other, kind, value)
        for _ in range(walks):
            one, two, apart = begin.copy(), beside.copy(), []

            def beside_it(out, token, one=one, two=two, apart=apart):
                text = names.decode([*out, token], skip_special_tokens=False)
                if apart or token >= 4092 or any(pattern.search(text) for pattern in APART.values()):
                    apart.append(text)  # from here on they may differ
                    return
                assert one.accepting() == two.accepting(), text
                assert two.advance([token]) == "", text

            walk(one, draw, most, beside_it)
            count += not apart
    return count


@pytest.mark.parametrize("name", SAME)
def test_both_back_ends_take_the_same_texts(name):
    both_ways("json_schema", KEYWORDS[name])


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", r"[a-z]{1,9}@[a-z]{1,9}\.com\n"),
        ("regex", r"^(ab|c){1,3}d$"),
        ("regex", r"[^x]{3}"),
        ("choice", ['a "quoted"\nline', "é😀", "\\", "Pos", "Positive"]),
        ("grammar", 'root ::= "a" root? | [b-d]{2}\n'),
        ("grammar", 'start: "(" inner ")" | "x"\ninner: "[" start "]" | "y"'),
    ],
)
def test_both_back_ends_take_the_same_words(kind, value):
    assert both_ways(kind, value, most=40) == 4


@pytest.mark.slow
def test_both_back_ends_take_the_same_texts_of_all_schemas():
    chosen = [schema for name, schema in schemas() if name not in UNLIKE and "format" not in json.dumps(schema)]
    alike = sum(both_ways("json_schema", schema) for schema in chosen)
    print(f"{alike} walks were followed to their end")
    assert alike > 300


# ---- in an engine


def test_without_the_library_the_start_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    monkeypatch.delitem(sys.modules, "kernel_guided_decoding.backends.xgrammar", raising=False)
    with pytest.raises(PluginError, match=r"pip install 'kernel-guided-decoding\[xgrammar\]'"):
        LLM("tiny-chat", device="cpu", plugins={"guided_decoding": {"backend": "xgrammar"}})


HUGE = {
    "long": {"json": {"type": "string", "maxLength": 1000}},
    "a million of a": {"regex": "(a{1000}){1000}"},
    "ambiguous": {"grammar": 'start: start start | "a" | start start start | ""'},
    "ambiguous rules": {"grammar": 'root ::= root root | "a" | root root root | ""'},
    "left recursion": {"json": {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]}}, "$ref": "#/$defs/a"}},
    "many choices": {"choice": [f"word{number} and more" for number in range(8000)]},
    "many keys": {"json": {"type": "object", "properties": {f"key number {n}": {"type": "integer"} for n in range(200)}}},
    "states": {"regex": "[ab]*a[ab]{60}"},
    "nowhere": {"grammar": "root ::= root"},
}


@pytest.mark.slow
def test_grammars_that_lead_nowhere_or_are_huge_fail_alone():
    keys = dict(model="tiny-chat", device="cpu", dtype="float32", max_requests=16, max_model_len=128)
    outputs = {}
    with Engine(**keys, plugins={"guided_decoding": {"backend": "xgrammar"}}) as engine:
        for name, form in {**HUGE, "free": None}.items():
            given = engine.intake.params(max_tokens=16, temperature=0.0, structured_outputs=form)
            engine.add_request(name, "Hi", given)
        while engine.has_unfinished_requests():
            outputs.update((output.request_id, output) for output in engine.step())
        engine.core.scheduler.check()
    assert {name: output.error for name, output in outputs.items() if output.error} == {
        "nowhere": "the grammar cannot be followed any further: no token can come next"
    }
    assert outputs["many choices"].outputs[0].text in HUGE["many choices"]["choice"]
