"""The clients that people use, unmodified, against a real server."""

import asyncio
import os

import pytest

MODEL = "tiny-chat"
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]
ANSWER = "Join two or more pathname components, inserting '/' as needed."
KEY = "sk-test"
openai = pytest.importorskip("openai")


@pytest.fixture(scope="module")
def server(start_server):
    return start_server(environment={"KERNEL_API_KEY": KEY})


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def test_openai_lists_models_and_completes(client):
    assert [model.id for model in client.models.list()] == [MODEL] and client.models.retrieve(MODEL).owned_by == "kernel"
    found = client.completions.create(model=MODEL, prompt="Hello", max_tokens=5, logprobs=1, temperature=0)
    assert found.choices[0].finish_reason in ("stop", "length") and found.usage.completion_tokens
    assert len(found.choices[0].logprobs.tokens) == found.usage.completion_tokens
    stream = client.completions.create(model=MODEL, prompt="Hello", max_tokens=5, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == found.choices[0].text


def test_openai_chats_whole_and_streamed_with_usage_and_our_own_fields(client):
    found = client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"top_k": 1, "return_token_ids": True})
    assert found.choices[0].message.content == ANSWER and found.choices[0].token_ids
    assert client.chat.completions.create(model=MODEL, messages=[*QUESTION, found.choices[0].message, *QUESTION]).choices
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(model=MODEL, messages=QUESTION, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    assert last.choices == [] and last.usage.total_tokens == found.usage.total_tokens
    with client.chat.completions.stream(model=MODEL, messages=QUESTION) as stream:
        stream.until_done()
        assert stream.get_final_completion().choices[0].message.content == ANSWER


def test_openai_async_runs_many_at_once_and_closes_a_stream_early(server):
    async def scenario():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            make = client.chat.completions.create
            found = await asyncio.gather(*(make(model=MODEL, messages=QUESTION) for _ in range(8)))
            assert {one.choices[0].message.content for one in found} == {ANSWER}
            stream = await make(model=MODEL, messages=QUESTION, stream=True, max_tokens=900, extra_body={"ignore_eos": True})
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(scenario())


def test_openai_gets_its_own_exceptions(client, server):
    with pytest.raises(openai.BadRequestError, match="nonsense") as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION, extra_body={"nonsense": 1})
    assert caught.value.param == "nonsense" and caught.value.code == "unknown_parameter" and caught.value.request_id
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.chat.completions.create(model="gpt-9", messages=QUESTION)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()


def test_openai_responses_whole_streamed_continued_and_cancelled(client):
    first = client.responses.create(model=MODEL, input=QUESTION[0]["content"])
    assert first.output_text == ANSWER and first.status == "completed"
    second = client.responses.create(model=MODEL, input="What does textwrap.dedent do?", previous_response_id=first.id)
    assert second.previous_response_id == first.id and second.usage.input_tokens > first.usage.total_tokens
    assert client.responses.retrieve(second.id).output_text == second.output_text
    with client.responses.stream(model=MODEL, input=QUESTION) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        assert "".join(deltas) == ANSWER == stream.get_final_response().output_text
    long = {"max_output_tokens": 900, "extra_body": {"ignore_eos": True}}
    running = client.responses.create(model=MODEL, input="Hello!", background=True, **long)
    cancelled = client.responses.cancel(running.id)
    assert running.status in ("queued", "in_progress") and cancelled.status == "cancelled"
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError, match="no response"):
        client.responses.retrieve(first.id)


def test_openai_responses_tell_cut_answers_and_instructions(client):
    cut = client.responses.create(model=MODEL, input=QUESTION, instructions="Be brief.", max_output_tokens=2, top_logprobs=1)
    assert cut.status == "incomplete" and cut.incomplete_details.reason == "max_output_tokens"
    assert cut.instructions == "Be brief." and len(cut.output[0].content[0].logprobs) == 2


def test_a_background_response_is_read_when_it_is_done(client):
    running = client.responses.create(model=MODEL, input=QUESTION, background=True)
    while running.status in ("queued", "in_progress"):
        running = client.responses.retrieve(running.id)
    assert running.status == "completed" and running.output_text == ANSWER


@pytest.mark.slow
def test_litellm(server):
    litellm = pytest.importorskip("litellm")
    call = dict(model=f"openai/{MODEL}", api_base=f"{server.url}/v1", api_key=KEY, messages=QUESTION)
    assert litellm.completion(**call).choices[0].message.content == ANSWER
    stream = litellm.completion(**call, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWER
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**call, extra_body={"nonsense": 1})


@pytest.mark.slow
def test_langchain(server):
    chat = pytest.importorskip("langchain_openai").ChatOpenAI(model=MODEL, base_url=f"{server.url}/v1", api_key=KEY)
    answer = chat.invoke(QUESTION[0]["content"])
    assert answer.content == ANSWER and answer.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(QUESTION[0]["content"])) == ANSWER


@pytest.fixture(scope="module")
def structured(start_server):
    """A server with grammars and tools."""
    for plugin in ("kernel_guided_decoding", "kernel_tool_calling"):
        pytest.importorskip(plugin)
    return start_server("--set", "plugins.guided_decoding={}", "--set", "plugins.tool_calling={}")


@pytest.mark.slow
def test_openai_parses_structured_answers(structured):
    from pydantic import BaseModel

    class Point(BaseModel):
        x: int
        y: int

    client = openai.OpenAI(base_url=f"{structured.url}/v1", api_key="none")
    parsed = client.chat.completions.parse(model=MODEL, messages=QUESTION, response_format=Point, max_tokens=200)
    assert isinstance(parsed.choices[0].message.parsed, Point)
    response = client.responses.parse(model=MODEL, input=QUESTION, text_format=Point, max_output_tokens=200)
    assert isinstance(response.output_parsed, Point)


@pytest.mark.slow
def test_instructor(structured):
    from pydantic import BaseModel

    instructor = pytest.importorskip("instructor")

    class Point(BaseModel):
        x: int
        y: int

    client = openai.OpenAI(base_url=f"{structured.url}/v1", api_key="none")
    for mode in (instructor.Mode.JSON_SCHEMA, instructor.Mode.TOOLS):
        patched = instructor.from_openai(client, mode=mode)
        found = patched.chat.completions.create(
            model=MODEL, messages=QUESTION, response_model=Point, max_retries=1, max_tokens=300
        )
        assert isinstance(found, Point)


os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # litellm would ask the network
