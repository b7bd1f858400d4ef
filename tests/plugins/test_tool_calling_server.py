"""Tools over HTTP with the unmodified `openai` client: the embedded model calls, gets the result, and answers from it."""

import json

import openai
import pytest
from jsonschema import Draft202012Validator

MODEL = "tiny-chat"
ASKED = [{"role": "user", "content": "Call math.sqrt with 16"}]
CALL = ("math.sqrt", {"x": 16})


def tool(name, *parameters):
    schema = {"type": "object", "properties": {key: {"type": "number"} for key in parameters}, "required": list(parameters)}
    return {"type": "function", "function": {"name": name, "description": "a function", "parameters": schema}}


TOOLS = [tool("math.sqrt", "x"), tool("math.pow", "x", "y")]


@pytest.fixture(scope="module")
def client(start_server):
    server = start_server("--set", "plugins.tool_calling={}")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client, messages=ASKED, **more):
    return client.chat.completions.create(model=MODEL, messages=messages, **{"tools": TOOLS, "temperature": 0, **more})


def called(message):
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def test_a_call_its_result_and_the_answer(client):
    choice = ask(client).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert called(choice.message) == [CALL]
    (call,) = choice.message.tool_calls
    assert call.type == "function" and len(call.id) == 9
    messages = [*ASKED, choice.message, {"role": "tool", "tool_call_id": call.id, "content": "4.0"}]
    choice = ask(client, messages).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("stop", "The result is 4.0.")
    assert choice.message.tool_calls is None


def test_a_streamed_call_joins_to_the_whole_one(client):
    chunks = [chunk.choices[0] for chunk in ask(client, stream=True)]
    pieces = [piece for choice in chunks for piece in choice.delta.tool_calls or ()]
    assert chunks[-1].finish_reason == "tool_calls" and not any(choice.delta.content for choice in chunks)
    assert [piece.function.name for piece in pieces if piece.function.name] == ["math.sqrt"]
    assert [piece.id for piece in pieces if piece.id] == [pieces[0].id] and {piece.index for piece in pieces} == {0}
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces)) == {"x": 16}


def test_the_clients_own_streaming_helper(client):
    with client.chat.completions.stream(model=MODEL, messages=ASKED, tools=TOOLS, temperature=0) as stream:
        for _ in stream:
            pass
        choice = stream.get_final_completion().choices[0]
    assert called(choice.message) == [CALL]


def test_several_choices_and_a_cut_call(client):
    choices = ask(client, n=2, temperature=0.1, seed=1).choices
    assert [called(choice.message) for choice in choices] == [[CALL], [CALL]]
    assert choices[0].message.tool_calls[0].id != choices[1].message.tool_calls[0].id
    cut = ask(client, max_tokens=4).choices[0]
    assert cut.finish_reason == "length" and cut.message.tool_calls is None and cut.message.content.startswith("<tool_call>")


def test_none_and_no_tools_leave_the_text_as_it_is(client):
    for more in ({"tool_choice": "none"}, {"tools": openai.omit}):
        choice = ask(client, **more).choices[0]
        assert choice.finish_reason == "stop" and choice.message.tool_calls is None
        assert choice.message.content == '<tool_call>{"name": "math.sqrt", "arguments": {"x": 16}}</tool_call>'
    answer = ask(client, [{"role": "user", "content": "What does os.path.join do?"}]).choices[0].message
    assert answer.content.startswith("Join two or more") and answer.tool_calls is None


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"tool_choice": "required"}, "enable guided_decoding"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, r"function of tools \(math.pow, math.sqrt\)"),
        ({"messages": [*ASKED, {"role": "tool", "tool_call_id": "x", "content": "4"}]}, "no assistant message before it"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "there are two tools named"),
    ],
)
def test_what_is_refused(client, more, sentence):
    with pytest.raises(openai.BadRequestError, match=sentence):
        ask(client, **more)


def test_responses(client):
    flat = [{"type": "function", "strict": None, **one["function"]} for one in TOOLS]
    first = client.responses.create(model=MODEL, input="Call math.sqrt with 16", tools=flat, temperature=0)
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert (call.name, json.loads(call.arguments)) == CALL
    given = [{"type": "function_call_output", "call_id": call.call_id, "output": "4.0"}]
    second = client.responses.create(model=MODEL, input=given, previous_response_id=first.id, tools=flat, temperature=0)
    assert second.output_text == "The result is 4.0."


# ---- forced calls


@pytest.fixture(scope="module")
def forcing(start_server):
    pytest.importorskip("kernel_guided_decoding", reason="nothing provides grammars")
    server = start_server("--set", "plugins.tool_calling={}", "--set", "plugins.guided_decoding={}")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


SWITCH = tool("switch")
SWITCH["function"]["parameters"] = {
    "type": "object",
    "properties": {"lamp": {"enum": ["red", "green"]}, "on": {"type": "boolean"}},
    "required": ["lamp", "on"],
    "additionalProperties": False,
}


def named(name):
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    ("question", "choice", "wanted"),
    [
        ("Call math.sqrt with 16", "required", CALL),
        ("Call math.pow with 2 and 10", named("math.pow"), ("math.pow", {"x": 2, "y": 10})),
        ("Hello!", named("switch"), ("switch", None)),  # nothing in the question asks for it
    ],
)
def test_a_forced_call_whole_and_streamed(forcing, question, choice, wanted):
    given = dict(messages=[{"role": "user", "content": question}], tools=[*TOOLS, SWITCH], tool_choice=choice, max_tokens=100)
    given["parallel_tool_calls"] = False
    whole = ask(forcing, **given).choices[0]
    assert whole.finish_reason == "tool_calls" and whole.message.content is None
    ((name, arguments),) = called(whole.message)
    assert name == wanted[0] and arguments == (wanted[1] or arguments)
    if name == "switch":
        assert Draft202012Validator(SWITCH["function"]["parameters"]).is_valid(arguments)
    pieces = [p for chunk in ask(forcing, stream=True, **given) for p in chunk.choices[0].delta.tool_calls or ()]
    assert [piece.function.name for piece in pieces if piece.function.name] == [name]
    assert json.loads("".join(piece.function.arguments or "" for piece in pieces)) == arguments


# ---- other clients


@pytest.mark.slow
def test_langchain_binds_a_function_and_continues_with_its_result(client):
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_core.tools import StructuredTool
    from langchain_openai import ChatOpenAI

    def root(x: float) -> float:
        """The square root of x"""
        return x**0.5

    function = StructuredTool.from_function(root, name="math.sqrt")
    model = ChatOpenAI(model=MODEL, base_url=str(client.base_url), api_key="none", temperature=0).bind_tools([function])
    messages = [HumanMessage("Call math.sqrt with 16")]
    answer = model.invoke(messages)
    (call,) = answer.tool_calls
    assert (call["name"], call["args"]) == CALL
    streamed = None
    for chunk in model.stream(messages):
        streamed = chunk if streamed is None else streamed + chunk
    assert [(one["name"], one["args"]) for one in streamed.tool_calls] == [CALL]
    result = function.invoke(call)
    assert isinstance(result, ToolMessage) and result.content == "4.0"
    assert model.invoke([*messages, answer, result]).content == "The result is 4.0."


@pytest.mark.slow
def test_litellm_reads_calls_whole_and_streamed(client, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it would ask the network
    import litellm

    given = dict(
        model=f"openai/{MODEL}", messages=ASKED, tools=TOOLS, api_base=str(client.base_url), api_key="none", temperature=0
    )
    choice = litellm.completion(**given).choices[0]
    assert choice.finish_reason == "tool_calls" and called(choice.message) == [CALL]
    chunks = list(litellm.completion(**given, stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=ASKED)
    assert called(built.choices[0].message) == [CALL]
