"""The service "tools/1": which format a model has, what a request may say, what its turn gives the server, and formats that
another plugin adds. Tokenizers, templates and the engine are real."""

import json
import sys

import pytest
from jsonschema import Draft202012Validator
from kernel_text.codec import Codec
from kernel_tiny import tiny_chat
from kernel_tool_calling import manifest
from kernel_tool_calling.detection import chat_template, choose_format, choose_reasoning
from kernel_tool_calling.formats import FORMATS
from kernel_tool_calling.reasoning import TAGS
from kernel_tool_calling.service import Tools, calls_schema
from kernel_tool_calling.verbs import make_verbs, message
from tokenizers import Tokenizer

from kernel_core.api import (
    BuildContext,
    CompletionOutput,
    ConfigError,
    KernelConfig,
    ModelInfo,
    RequestError,
    RequestOutput,
    SamplingParams,
    inspect_model,
    resolve,
)
from kernel_core.registry import Registry

SQRT = {
    "type": "function",
    "function": {
        "name": "math.sqrt",
        "parameters": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]},
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
ASKED = [{"role": "user", "content": "Call math.sqrt with 16"}]


def called(id="aaaaaaaaa", name="math.sqrt", arguments=None):
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments or {"x": 16}}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def result(id="aaaaaaaaa"):
    return {"role": "tool", "tool_call_id": id, "content": "4.0"}


@pytest.fixture(scope="module")
def registry():
    """The face of tiny-chat with the plugin."""
    opened = []

    def make(**section):
        plan = resolve({"model": "tiny-chat", "device": "cpu", "plugins": {"tool_calling": section}})
        opened.append(Registry(plan, "face", inspect_model(plan)))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


@pytest.fixture(scope="module")
def tools(registry):
    return registry().service("tools/1")


def begin(tools, messages=ASKED, given=(SQRT,), choice="auto", parallel=True):
    return tools.begin(messages, given, choice, parallel, {})


def read(parser, text):
    return message([delta for letter in text for delta in parser.push(letter, ())] + parser.finish())


# ---- which format


@pytest.mark.parametrize(
    ("template", "form", "tags"),
    [
        ("{{ '<tool_call>\\n{\"name\": ' }}", "hermes", None),
        ("<tool_call>{name}\n<arg_key>k</arg_key>", None, None),
        ("<tool_call>\n<function=f>\n<parameter=p>", "qwen3_coder", None),
        ("{{- '[TOOL_CALLS] [' }}", "mistral", None),
        ("{{ '[TOOL_CALLS]' }}[THINK]{{ x }}[/THINK]", "mistral", "think_brackets"),
        ("'<｜Assistant｜></think>' '<｜tool▁calls▁begin｜>'", "deepseek_v3", "think"),
        ("<|tool_calls_section_begin|>", "kimi_k2", None),
        (
            'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.',
            "llama3_json",
            None,
        ),
        ("Respond in the format [func_name1(params_name1=params_value1), func_name2(params)] <|python_tag|>", "pythonic", None),
        ("{{ messages[0].content }}", None, None),
    ],
)
def test_a_template_tells_the_format(tmp_path, template, form, tags):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    found = chat_template(ModelInfo(str(tmp_path), "none", {}))
    assert choose_format("auto", FORMATS, found) is FORMATS.get(form)
    assert choose_reasoning("auto", TAGS, found) == TAGS.get(tags)


def test_templates_are_read_wherever_checkpoints_keep_them(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("one")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "tool_use", "template": "two"}]}))
    assert chat_template(ModelInfo("/nowhere", "none", {}, tokenizer_path=str(tmp_path))) == "one\ntwo"
    assert chat_template(ModelInfo("/nowhere", "none", {})) == ""


def test_the_embedded_model_is_recognised_and_names_must_be_known(registry, tools):
    assert tools.form is FORMATS["hermes"] and tools.tags is None
    other = registry(parser="pythonic", reasoning_parser="think").service("tools/1")
    assert other.form is FORMATS["pythonic"] and other.tags == TAGS["think"]
    with pytest.raises(ConfigError, match=r"parser = 'hermess' is not known; there are: auto, deepseek_v3, hermes, kimi_k2"):
        registry(parser="hermess").service("tools/1")
    with pytest.raises(ConfigError, match=r"reasoning_parser = 'deep' is not known"):
        registry(reasoning_parser="deep").service("tools/1")


# ---- requests


def bad_tool(**function):
    return [{"type": "function", "function": {"name": "f", **function}}]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (dict(given=bad_tool(name="two words")), r"tools\[0\] must be a function whose name has 1 to 64"),
        (dict(given=bad_tool(name="x" * 65)), r"1 to 64"),
        (dict(given=[{"type": "function"}]), r"not None"),
        (dict(given=[SQRT, NOW, SQRT]), r"tools\[2\]: there are two tools named 'math.sqrt'"),
        (dict(given=bad_tool(parameters={"type": "array"})), r"JSON schema of type object"),
        (dict(given=bad_tool(parameters=[1])), r"JSON schema of type object"),
        (dict(given=[NOW] * 257), r"at most 256"),
        (dict(choice="maybe"), r"not 'maybe'"),
        (dict(choice={"type": "function", "function": {"name": "f"}}), r"\(math.sqrt\), not 'f'"),
        (dict(choice="required", given=()), r"tool_choice needs tools"),
        (dict(choice="required"), r"needs a grammar: enable guided_decoding"),
        (dict(messages=[*ASKED, result()]), r"messages\[1\] is the result of a tool, but no assistant message before it"),
        (dict(messages=[*ASKED, called(), result("bbbbbbbbb")]), r"has the tool_call_id 'bbbbbbbbb' \(open: aaaaaaaaa\)"),
        (dict(messages=[*ASKED, called(), result(), result()]), r"messages\[3\]: no unanswered call"),
        (dict(messages=[*ASKED, called(), {"role": "tool", "content": "4"}]), r"needs the tool_call_id"),
    ],
)
def test_what_a_request_may_not_say(tools, change, sentence):
    with pytest.raises(RequestError, match=sentence):
        begin(tools, **change)


def test_ids_may_come_again_in_a_later_turn(tools):
    begin(tools, [*ASKED, called(), result(), called(), result(), *ASKED])


def test_a_turn_without_tools_reads_no_calls(tools):
    text = 'x <tool_call>{"name": "now", "arguments": {}}</tool_call>'
    for turn in (begin(tools, given=()), begin(tools, choice="none")):
        assert turn.template_tools is None and turn.fields == {}
        assert read(turn.parser([1]), text) == {"role": "assistant", "content": text}
    turn = begin(tools)
    assert turn.template_tools == (SQRT,) and turn.fields == {}
    (call,) = read(turn.parser([1]), text)["tool_calls"]
    assert call["function"]["name"] == "now" and len(call["id"]) == 9 and call["id"].isalnum()


def test_only_the_first_call_where_they_may_not_be_parallel(tools):
    text = '<tool_call>{"name": "now"}</tool_call><tool_call>{"name": "math.sqrt", "arguments": {"x": 1}}</tool_call> ok'
    assert len(read(begin(tools).parser([1]), text)["tool_calls"]) == 2
    found = read(begin(tools, parallel=False).parser([1]), text)
    assert [call["function"]["name"] for call in found["tool_calls"]] == ["now"] and found["content"] == "ok"


def test_a_model_whose_format_is_not_known_refuses_tools(tools):
    unknown = Tools(tools.codec, None, None, None)
    assert begin(unknown, given=()).parser([1]).push("x", ()) == [{"content": "x"}]
    with pytest.raises(RequestError, match=r"set plugins\.tool_calling\.parser"):
        begin(unknown)


def test_conversations_are_rewritten_as_templates_want_them(tools):
    messages = [*ASKED, called("call_123456789"), result("call_123456789")]
    mistral = begin(Tools(tools.codec, None, FORMATS["mistral"], None), messages).template_messages
    assert mistral[1]["tool_calls"][0]["id"] == mistral[2]["tool_call_id"] == "123456789"
    deepseek = begin(Tools(tools.codec, None, FORMATS["deepseek_v3"], None), messages).template_messages
    assert deepseek[1]["tool_calls"][0]["function"]["arguments"] == '{"x": 16}'
    assert begin(tools, messages).template_messages is messages


def test_the_schema_that_forces_calls():
    both = {"now": {"type": "object", "properties": {}}, "math.sqrt": SQRT["function"]["parameters"]}
    several, one = (Draft202012Validator(calls_schema(both, many)) for many in (True, False))
    now, sqrt = {"name": "now", "arguments": {}}, {"name": "math.sqrt", "arguments": {"x": 1}}
    for schema in (several, one):
        assert schema.is_valid([now]) and schema.is_valid([sqrt])
        for wrong in ([], now, [{"name": "f", "arguments": {}}], [{"name": "math.sqrt", "arguments": {}}], [{"name": "now"}]):
            assert not schema.is_valid(wrong)
    assert several.is_valid([now, sqrt]) and not one.is_valid([now, sqrt])
    assert Draft202012Validator(calls_schema({"now": both["now"]}, False)).is_valid([now])


class Recorder:
    """A provider of grammars that says what it was asked for; the real one is tested over the server."""

    def __init__(self):
        self.asked = []

    def response_format(self, response_format):
        self.asked.append(response_format)
        return {"guided": "this"}


@pytest.mark.parametrize(
    ("choice", "parallel", "names", "most"),
    [
        ("required", True, ["math.sqrt", "now"], 16),
        ("required", False, ["math.sqrt", "now"], 1),
        ({"type": "function", "function": {"name": "now"}}, True, ["now"], 1),
    ],
)
def test_a_forced_turn(tools, choice, parallel, names, most):
    grammar = Recorder()
    forcing = Tools(tools.codec, grammar, FORMATS["hermes"], TAGS["think"])
    turn = begin(forcing, given=(SQRT, NOW), choice=choice, parallel=parallel)
    assert turn.fields == {"guided": "this"} and turn.template_tools == (SQRT, NOW)
    ((asked,),) = [grammar.asked]
    schema = asked["json_schema"]["schema"]
    items = schema["items"].get("anyOf", [schema["items"]])
    assert [one["properties"]["name"]["const"] for one in items] == names and schema["maxItems"] == most
    opened = tools.codec.encode("<think>\n", add_special_tokens=False)  # a grammar leaves no room for reasoning
    found = read(turn.parser(opened), '[{"name": "now", "arguments": {}}]')
    assert [call["function"]["name"] for call in found["tool_calls"]] == ["now"] and found["content"] == ""


# ---- special tokens and reasoning, with a real tokenizer

MARKS = ["[TOOL_CALLS]", "<think>", "</think>"]


@pytest.fixture(scope="module")
def special(tmp_path_factory):
    """tiny-chat's tokenizer in which marks are special tokens, as Mistral's are."""
    folder = tmp_path_factory.mktemp("special")
    tokenizer = Tokenizer.from_file(str(tiny_chat() / "tokenizer.json"))
    tokenizer.add_special_tokens(MARKS)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    return Codec(ModelInfo(str(folder), "none", {}))


def test_marks_that_are_special_tokens_stay_in_the_text(special):
    tools = Tools(special, None, FORMATS["mistral"], TAGS["think"])
    turn = begin(tools)
    assert turn.fields == {"skip_special_tokens": False}
    answer = '<think>Hm: é😀.</think>\n\nWell.[TOOL_CALLS][{"name": "math.sqrt", "arguments": {"x": 16}}]'
    ids = special.encode(answer, add_special_tokens=False)
    stream, parser, deltas = special.stream([1], SamplingParams.of(**turn.fields)), turn.parser([1]), []
    for token in ids:
        deltas += parser.push(stream.push([token])[0], [token])
    found = message(deltas + parser.push(stream.flush(), ()) + parser.finish())
    assert (found["reasoning_content"], found["content"]) == ("Hm: é😀.", "Well.")
    assert found["tool_calls"][0]["function"] == {"name": "math.sqrt", "arguments": '{"x": 16}'}
    assert begin(Tools(special, None, FORMATS["hermes"], None)).fields == {}


def test_a_prompt_that_opened_the_reasoning(special):
    turn = begin(Tools(special, None, FORMATS["hermes"], TAGS["think"]), given=())
    prompt = special.encode("What is <think>?<|end|><|assistant|>", add_special_tokens=False)
    text = "It is a tag.</think>Yes."
    opened = special.encode("<think>\n", add_special_tokens=False)
    closed = special.encode("<think>\n\n</think>\n\n", add_special_tokens=False)
    assert read(turn.parser(prompt + opened), text) == {
        "role": "assistant",
        "content": "Yes.",
        "reasoning_content": "It is a tag.",
    }
    for ids in (prompt, prompt + closed):
        assert read(turn.parser(ids), text) == {"role": "assistant", "content": text}


# ---- another plugin adds a format

ADDED = '''
import json, re
from kernel_core.api import Manifest, hookimpl

manifest = Manifest(name="shouting", summary="CALL name {arguments}")


class Parser:
    """As simple as it gets: nothing is shown before the end."""

    def __init__(self): self.text = ""

    def push(self, text, token_ids):
        self.text += text
        return []

    def finish(self):
        found = re.fullmatch(r"CALL (\\S+) (.*)", self.text)
        if not found: return [{"content": self.text}]
        return [{"tool_call": {"index": 0, "name": found[1], "arguments": found[2]}}]


class Shouting:
    markers = ()
    def recognises(self, template): return "<tool_call>" in template
    def messages(self, messages): return messages
    def parser(self, tools): return Parser()


@hookimpl(optionalhook=True)
def register_tool_formats(context): return {"shouting": Shouting()}


@hookimpl(optionalhook=True)
def register_reasoning_tags(context): return {"aside": ("(", ")")}
'''


@pytest.fixture
def added(tmp_path, monkeypatch):
    (tmp_path / "shouting.py").write_text(ADDED)
    metadata = tmp_path / "shouting-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shouting\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[kernel_core.plugins]\nshouting = shouting\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("shouting", None)


@pytest.mark.parametrize("section", [{"parser": "shouting", "reasoning_parser": "aside"}, {"reasoning_parser": "aside"}])
def test_another_plugin_adds_a_format_and_tags(added, section):
    plan = resolve({"model": "tiny-chat", "device": "cpu", "plugins": {"tool_calling": section, "shouting": {}}})
    registry = Registry(plan, "face", inspect_model(plan))
    found = read(begin(registry.service("tools/1")).parser([1]), "(I call.) CALL now {}")
    registry.close()
    (call,) = found["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"} and len(call["id"]) == 9
    assert found["reasoning_content"] == "I call."


# ---- without a server (examples/23 runs two turns)


def verb(codec, form):
    section = manifest.section(parser=form, reasoning_parser="none")
    services = {"text/1": codec, "grammar/1": None}
    context = BuildContext(
        "tool_calling",
        "face",
        section,
        KernelConfig(),
        ModelInfo("/nowhere", "none", {}),
        lambda name, protocol=None: services[name],
        ask=lambda hook: [],
    )
    return lambda *given: make_verbs(context)["read_answer"](None, *given)


@pytest.mark.parametrize("form", ["mistral", "deepseek_v3", "hermes"])
def test_an_answer_is_read_without_a_server(special, form):
    """Marks that are special tokens are not in the text: the tokens have them."""
    texts = {
        "mistral": '[TOOL_CALLS]math.sqrt[ARGS]{"x": 16}',
        "hermes": '<tool_call>{"name": "math.sqrt", "arguments": {"x": 16}}</tool_call>',
        "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>math.sqrt<｜tool▁sep｜>"
        '{"x": 16}<｜tool▁call▁end｜><｜tool▁calls▁end｜>',
    }
    ids = special.encode(f"Well. {texts[form]}<|end|>", add_special_tokens=False)
    one = CompletionOutput(0, special.decode(ids), ids, finish_reason="stop")
    found = verb(special, form)(RequestOutput("1", None, [1], [one]), [SQRT])
    (call,) = found["tool_calls"]
    assert found["content"] == "Well." and len(call["id"]) == 9
    arguments = '{"x": 16}' if form == "deepseek_v3" else {"x": 16}
    assert call["function"] == {"name": "math.sqrt", "arguments": arguments}


def test_arguments_that_were_cut_stay_text(special):
    text = '<tool_call>{"name": "math.sqrt", "arguments": {"x": 1'
    one = CompletionOutput(0, text, special.encode(text, add_special_tokens=False), finish_reason="length")
    (call,) = verb(special, "hermes")(RequestOutput("1", None, [1], [one]), [SQRT])["tool_calls"]
    assert call["function"]["arguments"] == '{"x": 1'
