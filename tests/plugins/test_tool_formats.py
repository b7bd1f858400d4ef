"""Formats of tool calls, on transcripts: what is found does not depend on how the text is cut, nothing raises, and transformers'
own parser, where it can say the format, finds the same."""

import json
import random
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tool_calling.formats import FORMATS, JSON_LIST
from kernel_tool_calling.reasoning import TAGS, Split
from kernel_tool_calling.verbs import message
from transformers.utils.chat_parsing import parse_response

DATA = tomllib.loads(Path(__file__).with_name("tool_transcripts.toml").read_text(encoding="utf-8"))
CASES = [(form, case) for form, cases in DATA.items() for case in cases]
NAMES = [f"{form}: {case['name']}" for form, case in CASES]


def schema(**types):
    return {"type": "object", "properties": {key: {"type": one} for key, one in types.items()}}


TOOLS = {
    "get_weather": schema(city="string", days="integer"),
    "write_file": schema(path="string", text="string", flags="object"),
    "search": schema(query="string", limit="integer", exact="boolean"),
    "now": schema(),
}


def parse(form, pieces):
    parser = FORMATS[form].parser(TOOLS)
    deltas = [delta for piece in pieces for delta in parser.push(piece, ())]
    return message(deltas + parser.finish())


def called(found):
    return [(call["function"]["name"], call["function"]["arguments"]) for call in found.get("tool_calls", ())]


def test_every_format_has_transcripts_of_all_kinds():
    assert set(DATA) == set(FORMATS)
    for form, cases in DATA.items():
        assert any(len(case.get("calls", ())) > 1 for case in cases), form
        assert any(case.get("cut") for case in cases) or form == "kimi_k2", form
        assert any(case.get("content") == case["text"] for case in cases), form


@pytest.mark.parametrize(("form", "case"), CASES, ids=NAMES)
def test_transcript(form, case):
    found = parse(form, [case["text"]])
    assert found["content"] == case.get("content", "")
    wanted = [tuple(call) for call in case.get("calls", ())]
    if case.get("cut"):
        assert called(found) == wanted
    else:
        assert [(n, json.loads(a)) for n, a in called(found)] == [(n, json.loads(a)) for n, a in wanted]
    if "ids" in case:
        assert [call["id"] for call in found["tool_calls"]] == case["ids"]


@pytest.mark.parametrize(("form", "case"), CASES, ids=NAMES)
def test_cuts_change_nothing(form, case):
    """Cut in two at every position, and into single characters."""
    text = case["text"]
    whole = parse(form, [text])
    assert parse(form, text) == whole
    for at in range(1, len(text)):
        assert parse(form, [text[:at], text[at:]]) == whole, at


@pytest.mark.parametrize(("form", "case"), CASES, ids=NAMES)
def test_text_that_ends_anywhere(form, case):
    """No beginning of an answer raises, streamed and whole agree on it, and no delta is taken back later."""
    text = case["text"]
    whole = parse(form, [text])
    parser, deltas = FORMATS[form].parser(TOOLS), []
    for at, letter in enumerate(text):
        deltas += parser.push(letter, ())
        shown = message(deltas)
        assert whole["content"].startswith(shown["content"])
        for mine, final in zip(called(shown), called(whole)):
            assert mine[0] == final[0] and final[1].startswith(mine[1])
        if at % 7 == 3:
            assert parse(form, text[:at]) == parse(form, [text[:at]])


def test_arguments_are_streamed_as_they_come():
    """Not once the call is whole."""
    for form, cases in DATA.items():
        case = next(case for case in cases if case.get("calls"))
        parser, pieces = FORMATS[form].parser(TOOLS), 0
        for letter in case["text"]:
            pieces += sum("arguments" in delta.get("tool_call", {}) for delta in parser.push(letter, ()))
        assert pieces >= 2, form


ELEMENTS = ["</tool_call>", "<function=now>", "</function>", "<parameter=x>", "</parameter>", "<think>", "</think>", "```json\n"]
HEADERS = ["<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>", "<|tool_call_end|>", "<｜tool▁sep｜>"]
SCRAPS = [*'"\\{}[],:)- \n\0é😀', "e\u0301", "\\u00e", "1e", "now(", "x=1", '{"name": "now", "arguments": {}}']
PIECES = [*ELEMENTS, *HEADERS, *SCRAPS, *sorted({mark for form in FORMATS.values() for mark in form.markers})]


@settings(max_examples=60, deadline=None)
@given(
    form=st.sampled_from(sorted(FORMATS)),
    pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=4), max_size=12),
    seed=st.integers(0, 1000),
)
def test_soup_never_raises_and_cuts_change_nothing(form, pieces, seed):
    text = "".join(pieces)
    assert parse(form, _random_pieces(text, seed)) == parse(form, [text])
    if not called(parse(form, [text])):
        assert parse(form, [text])["content"] == text


@settings(max_examples=60, deadline=None)
@given(case=st.sampled_from(CASES), seed=st.integers(0, 10_000))
def test_damaged_transcripts_in_random_pieces(case, seed):
    form, text = case[0], case[1]["text"]
    draw = random.Random(seed)
    for _ in range(draw.randint(0, 3)):
        at = draw.randrange(len(text) + 1)
        text = text[:at] + draw.choice(['"', "}", "\\", "", "<", "x"]) + text[at + draw.randint(0, 2) :]
    assert parse(form, _random_pieces(text, seed)) == parse(form, [text])


def _random_pieces(text, seed):
    draw, pieces = random.Random(seed), []
    while text:
        size = draw.choice((1, 1, 2, 3, 5, 8, 40))
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@pytest.mark.parametrize(
    "text", ["[" * 500, '{"name": "now", "arguments": ' + '{"a":' * 500, "[now(x=" + "[" * 500, "[now(x=" + "-" * 9000 + "1)]"]
)
def test_depth_is_bounded(text):
    for form in FORMATS:
        markers = FORMATS[form].markers or ("",)
        parse(form, [markers[0] + text])


def test_a_list_that_a_grammar_made():
    parser = JSON_LIST.parser(TOOLS)
    text = '[{"name": "now", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "Ulm"}}]'
    deltas = [delta for letter in text for delta in parser.push(letter, ())] + parser.finish()
    assert called(message(deltas)) == [("now", "{}"), ("get_weather", '{"city": "Ulm"}')]


# ---- an independent parser


def template(**fields):
    return {"defaults": {"role": "assistant"}, "start_anchor": "<answer>", "fields": fields}


def region(opening, closing, **more):
    return {"open_pattern": opening, "close_pattern": closing, "repeats": True, "content": "json", **more}


CALL = {"type": "function", "function": "{content}"}
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
XML = {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n(?P<value>.*?)\n</parameter>"}
TEMPLATES = {
    "hermes": region(r"\s*<tool_call>\s*", r"\s*</tool_call>", transform=CALL),
    "mistral": region(r"\[TOOL_CALLS\](?P<name>\w+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?", r"(?=\[TOOL_CALLS\])|$", transform=NAMED),
    "qwen3_coder": region(
        r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
        r"</function>\s*</tool_call>",
        content="xml-inline",
        content_args=XML,
        transform=NAMED,
    ),
    "deepseek_v3": region(
        r"(?:\s*<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>)?(?P<name>\w+)(?:<｜tool▁sep｜>|\n```json\n)",
        r"(?:\n```)?<｜tool▁call▁end｜>(?:<｜tool▁calls▁end｜>)?",
        transform=NAMED,
    ),
    "kimi_k2": region(
        r"(?:\s*<\|tool_calls_section_begin\|>)?\s*<\|tool_call_begin\|>functions\.(?P<name>\w+):\d+<\|tool_call_argument_begin\|>",
        r"<\|tool_call_end\|>(?:<\|tool_calls_section_end\|>)?",
        transform=NAMED,
    ),
}
PLAIN_CALLS = {
    "hermes": '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>',
    "mistral": "[TOOL_CALLS]%s[ARGS]%s",
    "deepseek_v3": "<｜tool▁call▁begin｜>%s<｜tool▁sep｜>%s<｜tool▁call▁end｜>",
    "kimi_k2": "<|tool_call_begin|>functions.%s:0<|tool_call_argument_begin|>%s<|tool_call_end|>",
}
SECTIONS = {
    "deepseek_v3": "<｜tool▁calls▁begin｜>%s<｜tool▁calls▁end｜>",
    "kimi_k2": "<|tool_calls_section_begin|>%s<|tool_calls_section_end|>",
}
WORDS = st.text("abé😀 {}[]\"\\'\n:,", max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=5,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(["now", "search"]), st.dictionaries(WORDS, VALUES, max_size=3)), min_size=1, max_size=3
)


def compare(form, content, text):
    theirs = parse_response(
        text, template(tool_calls=TEMPLATES[form], content={"content": "text"}), prefix="<answer>", tools=None
    )
    ours = parse(form, [text])
    made = [call["function"] for call in theirs.get("tool_calls", ())]
    assert [(call["name"], call["arguments"]) for call in made] == [(n, json.loads(a)) for n, a in called(ours)]
    assert ours["content"] == theirs.get("content", "") == content
    return ours


@settings(max_examples=100, deadline=None)
@given(
    form=st.sampled_from(sorted(PLAIN_CALLS)), calls=CALLS, ascii_only=st.booleans(), before=st.sampled_from(["", "Yes. I do."])
)
def test_transformers_reads_the_same_calls(form, calls, ascii_only, before):
    texts = [PLAIN_CALLS[form] % (name, json.dumps(arguments, ensure_ascii=ascii_only)) for name, arguments in calls]
    ours = compare(form, before, before + SECTIONS.get(form, "%s") % ("" if form != "hermes" else "\n").join(texts))
    assert [(name, json.loads(arguments)) for name, arguments in called(ours)] == calls


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text("abé😀 {}[]\"\\'\n:,<>/", min_size=1, max_size=12), min_size=1, max_size=3))
def test_transformers_reads_the_same_elements(texts):
    """Arguments that are strings: the other types are ours to read by the schema."""
    elements = [f"<parameter=k{i}>\n{text}\n</parameter>\n" for i, text in enumerate(texts)]
    text = f"<tool_call>\n<function=write_file>\n{''.join(elements)}</function>\n</tool_call>"
    strings = {"write_file": schema(**{f"k{i}": "string" for i in range(len(texts))})}
    theirs = parse_response(text, template(tool_calls=TEMPLATES["qwen3_coder"], content={"content": "text"}), prefix="<answer>")
    parser = FORMATS["qwen3_coder"].parser(strings)
    (call,) = message(parser.push(text, ()) + parser.finish())["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == theirs["tool_calls"][0]["function"]["arguments"]
    assert list(json.loads(call["function"]["arguments"]).values()) == texts


# ---- reasoning

ANSWER = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
THOUGHTS = [
    ("<think>\nHm, 2 < 3.\n</think>\n\nYes.", False, "Hm, 2 < 3.", "Yes.", 0),
    ("\n<think>a</think>" + ANSWER, False, "a", "", 1),
    ("<think>\n\n</think>\n\nYes.", False, "", "Yes.", 0),
    ("Okay, so\n\nit is.\n</think>\nYes. </think>\n", True, "Okay, so\n\nit is.", "Yes. </think>\n", 0),
    ("<think>again opened</think>Yes.", True, "again opened", "Yes.", 0),
    ("never closed <thin", True, "never closed <thin", "", 0),
    ("<think>never closed\n", False, "never closed", "", 0),
    ("never closed, but a call\n" + ANSWER, True, "never closed, but a call", "", 1),
    ("No reasoning. <think>not here</think>", False, "", "No reasoning. <think>not here</think>", 0),
    ("\n <thin", False, "", "\n <thin", 0),
    ("", True, "", "", 0),
]


def think(pieces, opened):
    parser = Split(TAGS["think"], opened, ("<tool_call>",), FORMATS["hermes"].parser(TOOLS))
    return message([delta for piece in pieces for delta in parser.push(piece, ())] + parser.finish())


@pytest.mark.parametrize(("text", "opened", "reasoning", "content", "calls"), THOUGHTS)
def test_reasoning(text, opened, reasoning, content, calls):
    found = think([text], opened)
    assert found.get("reasoning_content", "") == reasoning
    assert (found["content"], len(called(found))) == (content, calls)
    assert think(text, opened) == found
    for at in range(len(text)):
        assert think([text[:at], text[at:]], opened) == found, at


COMPARED = [(text, opened) for text, opened, reasoning, *_ in THOUGHTS if reasoning and text.count("think>") == 2 - opened]


@pytest.mark.parametrize(("text", "opened"), COMPARED)
def test_transformers_splits_the_same_reasoning(text, opened):
    fields = {"reasoning": {"open": "<think>", "close": "</think>"}, "tool_calls": TEMPLATES["hermes"], "content": {}}
    theirs = parse_response(text, template(**fields), prefix="<answer>" + ("<think>\n" if opened else ""))
    ours = think([text], opened)
    assert (ours["reasoning_content"], ours["content"]) == (theirs["reasoning"], theirs.get("content", ""))
