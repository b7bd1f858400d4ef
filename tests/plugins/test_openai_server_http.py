"""The HTTP API on a real server: answers equal those of the engine, streams equal whole answers, and what cannot be done is
refused with a status, a field and a sentence."""

import asyncio
import json
import socket
import time

import httpx
import pytest

from kernel_core.api import LLM, SamplingParams

MODEL = "tiny-chat"
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]
ANSWER = "Join two or more pathname components, inserting '/' as needed."
PATIENCE = 60


@pytest.fixture(scope="module")
def server(start_server):
    return start_server("--set", "plugins.openai_server.max_body_bytes=100000", "--set", "engine.max_requests=16")


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture(scope="module")
def llm():
    llm = LLM(model=MODEL, device="cpu", engine={"threads": 1})
    yield llm
    llm.close()


def events(response: httpx.Response) -> list[dict]:
    """The events of a stream, which must end with [DONE]."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def complete(client, **body) -> dict:
    response = client.post("/v1/completions", json={"model": MODEL, **body})
    assert response.status_code == 200, response.text
    return response.json()


def chat(client, **body) -> dict:
    response = client.post("/v1/chat/completions", json={"model": MODEL, "messages": QUESTION, **body})
    assert response.status_code == 200, response.text
    return response.json()


def error(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"} and found["message"]
    return found


# ---- completions


def test_a_completion_is_what_the_engine_gives(client, llm):
    sampling = dict(temperature=0.8, seed=7, max_tokens=20, top_p=0.9, top_k=30, presence_penalty=0.5)
    (expected,) = llm.generate("def join(", SamplingParams.of(**sampling))
    found = complete(client, prompt="def join(", max_drafts=0, **sampling)
    assert found["choices"][0]["text"] == expected.outputs[0].text
    assert found["choices"][0]["finish_reason"] == expected.outputs[0].finish_reason
    count = len(expected.outputs[0].token_ids)
    assert found["usage"]["completion_tokens"] == count and found["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)


def test_prompts_come_as_text_or_ids_one_or_many_and_choices_are_in_order(client):
    ids = client.post("/tokenize", json={"prompt": "Hello"}).json()["tokens"]
    sampling = dict(temperature=2, max_tokens=6, ignore_eos=True, seed=3, return_token_ids=True)
    one = complete(client, prompt="Hello", **sampling)["choices"][0]
    assert complete(client, prompt=ids, **sampling)["choices"][0]["token_ids"] == one["token_ids"]
    many = complete(client, prompt=["Hello", "What"], n=2, **sampling)["choices"]
    assert [choice["index"] for choice in many] == [0, 1, 2, 3]
    assert many[0]["token_ids"] == one["token_ids"] != many[1]["token_ids"] and many[0]["prompt_token_ids"] == ids
    assert complete(client, prompt=[ids, ids], **sampling)["choices"][1]["token_ids"] == one["token_ids"]


def test_a_stream_of_many_choices_joins_to_the_whole_answer(client):
    body = dict(prompt=["Hello", "What does"], n=2, max_tokens=15, temperature=0.9, seed=1, return_token_ids=True)
    whole = complete(client, **body)
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = events(client.post("/v1/completions", json={**body, "stream": True, "stream_options": options}))
    assert stream[-1]["choices"] == []
    for choice in whole["choices"]:
        pieces = [c for chunk in stream for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [token for piece in pieces for token in piece["token_ids"]] == choice["token_ids"]
        assert [piece["finish_reason"] for piece in pieces if piece["finish_reason"]] == [choice["finish_reason"]]
    counts = [chunk["usage"]["completion_tokens"] for chunk in stream]
    assert counts == sorted(counts) and counts[-1] == whole["usage"]["completion_tokens"]


def test_usage_comes_only_when_asked_for(client):
    plain = events(client.post("/v1/completions", json={"prompt": "Hello", "stream": True, "max_tokens": 3}))
    assert not any("usage" in chunk for chunk in plain)
    body = {"prompt": "Hello", "stream": True, "max_tokens": 3, "stream_options": {"include_usage": True}}
    asked = events(client.post("/v1/completions", json=body))
    assert [chunk["usage"] for chunk in asked[:-1]] == [None] * (len(asked) - 1) and asked[-1]["usage"]["total_tokens"] > 3


def test_echo_with_logprobs_covers_the_prompt_and_may_generate_nothing(client, llm):
    prompt = "What does os.path.join do?"
    found = complete(client, prompt=prompt, echo=True, max_tokens=0, logprobs=1)
    choice, logprobs = found["choices"][0], found["choices"][0]["logprobs"]
    assert choice["text"] == prompt and found["usage"]["completion_tokens"] == 0
    assert "".join(logprobs["tokens"]) == prompt and logprobs["token_logprobs"][0] is None
    assert [prompt[at : at + len(t)] for at, t in zip(logprobs["text_offset"], logprobs["tokens"])] == logprobs["tokens"]
    (expected,) = llm.generate(prompt, SamplingParams.of(prompt_logprobs=1, max_tokens=1))
    values = [entry[token].logprob for token, entry in zip(expected.prompt_token_ids[1:], expected.prompt_logprobs[1:])]
    assert logprobs["token_logprobs"][1:] == pytest.approx(values, abs=1e-4)
    more = complete(client, prompt=prompt, echo=True, max_tokens=4, logprobs=0, ignore_eos=True)["choices"][0]
    assert more["text"].startswith(prompt) and len(more["logprobs"]["tokens"]) == len(logprobs["tokens"]) + 4
    body = {"prompt": prompt, "echo": True, "max_tokens": 4, "stream": True, "ignore_eos": True}
    stream = events(client.post("/v1/completions", json=body))
    assert "".join(chunk["choices"][0]["text"] for chunk in stream) == more["text"]


def test_prompt_logprobs_have_ranks_and_names(client):
    choice = complete(client, prompt="Hello world", prompt_logprobs=2, max_tokens=1)["choices"][0]
    first, *rest = choice["prompt_logprobs"]
    assert first is None and rest
    assert all(
        len(entry) in (2, 3) and all(set(one) == {"logprob", "rank", "decoded_token"} for one in entry.values()) for entry in rest
    )


def test_stops_cut_the_text_and_say_why(client):
    whole = complete(client, prompt="What does", max_tokens=12, ignore_eos=True, temperature=0)["choices"][0]["text"]
    stop = whole[6:9]
    body = dict(prompt="What does", max_tokens=12, ignore_eos=True, temperature=0, stop=["never", stop])
    cut = complete(client, **body)["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)] and cut["finish_reason"] == "stop" and cut["stop_reason"] == stop
    kept = complete(client, **body, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == cut["text"] + stop
    stream = events(client.post("/v1/completions", json={**body, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in stream) == cut["text"]


def test_logit_bias_and_other_fields_of_plugins_reach_them(client):
    token = client.post("/tokenize", json={"prompt": "Hello"}).json()["tokens"][0]
    biased = complete(client, prompt="What", max_tokens=3, logit_bias={str(token): 100}, return_token_ids=True, temperature=0)
    assert biased["choices"][0]["token_ids"] == [token] * 3
    allowed = complete(client, prompt="What", max_tokens=3, allowed_token_ids=[token], return_token_ids=True)
    assert allowed["choices"][0]["token_ids"] == [token] * 3
    assert (
        complete(client, prompt="What", max_tokens=2, cache_salt="mine")["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    )


def test_repeated_prompts_are_cached_and_usage_says_so(client):
    prompt = "one two three four five six seven eight nine ten " * 8
    complete(client, prompt=prompt, max_tokens=2)
    again = complete(client, prompt=prompt, max_tokens=2)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] >= 16


def test_long_prompts_are_refused_or_truncated(client):
    long = "word " * 3000
    found = error(client.post("/v1/completions", json={"prompt": long}), 400)
    assert found["code"] == "context_length_exceeded" and "1024" in found["message"]
    kept = complete(client, prompt=long, max_tokens=1, truncate_prompt_tokens=5, return_token_ids=True)
    assert len(kept["choices"][0]["prompt_token_ids"]) == 5
    fitted = complete(client, prompt=long, max_tokens=9, truncate_prompt_tokens=-1)
    assert fitted["usage"]["prompt_tokens"] == 1023 and fitted["choices"][0]["finish_reason"] == "length"


# ---- chat


def test_a_chat_answers_and_its_stream_begins_with_the_role(client):
    found = chat(client)
    assert found["object"] == "chat.completion" and found["choices"][0]["message"]["content"] == ANSWER
    assert found["choices"][0]["finish_reason"] == "stop" and found["id"].startswith("chatcmpl-")
    stream = events(client.post("/v1/chat/completions", json={"messages": QUESTION, "stream": True}))
    assert stream[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in stream) == ANSWER
    assert [chunk["choices"][0]["finish_reason"] for chunk in stream][-1] == "stop"
    assert len({chunk["id"] for chunk in stream}) == 1


def test_chat_logprobs_have_bytes_and_streams_have_all_of_them(client):
    body = {"messages": QUESTION, "logprobs": True, "top_logprobs": 2}
    whole = chat(client, **body)["choices"][0]["logprobs"]["content"]
    assert bytes(b for token in whole[:-1] for b in token["bytes"]).decode() == ANSWER
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in whole)
    stream = events(client.post("/v1/chat/completions", json={**body, "stream": True}))
    pieces = [c["logprobs"]["content"] for chunk in stream for c in chunk["choices"] if c["logprobs"]]
    assert [token["bytes"] for piece in pieces for token in piece] == [token["bytes"] for token in whole]
    assert [t["logprob"] for piece in pieces for t in piece] == pytest.approx([t["logprob"] for t in whole], abs=1e-4)


def test_contents_in_parts_and_developer_messages_are_understood(client):
    parts = [{"type": "text", "text": QUESTION[0]["content"]}]
    assert chat(client, messages=[{"role": "user", "content": parts}])["choices"][0]["message"]["content"] == ANSWER
    developer = chat(client, messages=[{"role": "developer", "content": "Be brief."}, *QUESTION], return_token_ids=True)
    system = chat(client, messages=[{"role": "system", "content": "Be brief."}, *QUESTION], return_token_ids=True)
    assert developer["prompt_token_ids"] == system["prompt_token_ids"]


def test_several_choices_of_a_chat_stream_side_by_side(client):
    body = {"messages": QUESTION, "n": 3, "temperature": 1.5, "seed": 5, "max_tokens": 10}
    whole = chat(client, **body)["choices"]
    stream = events(client.post("/v1/chat/completions", json={**body, "stream": True}))
    for choice in whole:
        pieces = [c["delta"] for chunk in stream for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(piece.get("content", "") for piece in pieces) == choice["message"]["content"]


def test_without_detokenisation_ids_are_streamed(client):
    body = {"messages": QUESTION, "detokenize": False, "return_token_ids": True}
    whole = chat(client, **body)["choices"][0]
    stream = events(client.post("/v1/chat/completions", json={**body, "stream": True}))
    assert whole["message"]["content"] == "" and whole["token_ids"]
    ids = [token for chunk in stream for choice in chunk["choices"] for token in choice.get("token_ids", [])]
    assert ids == whole["token_ids"]


# ---- refusals

REFUSALS = [
    ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": "hot"}, "temperature", "valid number"),
    ({"presence_penalty": 3}, "presence_penalty", "less than or equal to 2"),
    ({"n": 0}, "n", "greater than or equal to 1"),
    ({"n": 1000}, "n", "1000 choices"),
    ({"stop": ["a", ""]}, None, "empty string"),
    ({"priority": 3}, None, "needs a policy"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 50}, "top_logprobs", "at most 20"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "differ"),
    ({"messages": []}, "messages", "at least 1 item"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", "Input should be"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content.0.type",
        "image_url",
    ),
    ({"chat_template": "x"}, "chat_template", "allow_chat_template"),
    ({"logit_bias": {"99999": 1}}, None, "token ids are 0 to"),
    ({"tool_choice": "auto"}, "tool_choice", "needs tools"),
    ({"functions": []}, "functions", "unknown field"),
    ({"stop_token_ids": [99999]}, None, "99999"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSALS, ids=[str(fields)[:40] for fields, _, _ in REFUSALS])
def test_what_cannot_be_done_is_a_400_that_says_what_to_do(client, fields, param, message):
    found = error(client.post("/v1/chat/completions", json={"messages": QUESTION, **fields}), 400)
    assert found["type"] == "invalid_request_error" and found["param"] == param and message in found["message"]


def test_bodies_that_are_no_requests_are_refused(client):
    def send(content: bytes, kind: str = "application/json") -> httpx.Response:
        return client.post("/v1/completions", content=content, headers={"content-type": kind})

    assert error(send(b"{nope"), 400)["code"] == "invalid_json"
    for content in (b"[1]", b"\xff", b'"\\ud800"', b'{"prompt": NaN}', b"[" * 50000):
        error(send(content), 400)
    assert error(send(b'{"prompt": "x"}', "text/plain"), 415)["message"].startswith("the content type is 'text/plain'")
    assert error(send(b'{"prompt": "' + b"x" * 200_000 + b'"}'), 413)["code"] == "body_too_large"
    assert error(client.post("/v1/completions", json={}), 400)["param"] == "prompt"


def test_unknown_models_routes_and_methods_are_error_objects(client):
    found = error(client.post("/v1/completions", json={"model": "gpt-9", "prompt": "x"}), 404)
    assert found["code"] == "model_not_found" and found["param"] == "model" and MODEL in found["message"]
    error(client.get("/v1/models/gpt-9"), 404)
    error(client.get("/v2/nothing"), 404)
    assert client.get("/v1/completions").headers["allow"] == "POST"
    error(client.get("/v1/completions"), 405)


def test_response_format_without_grammars_says_which_plugin(client):
    body = {"messages": QUESTION, "response_format": {"type": "text"}}
    assert chat(client, **body)["choices"][0]["message"]["content"] == ANSWER
    response = client.post("/v1/chat/completions", json={"messages": QUESTION, "response_format": {"type": "json_object"}})
    assert error(response, 400)["message"].endswith("enable guided_decoding ([plugins.guided_decoding])")


def test_what_openai_defines_and_nobody_needs_here_is_ignored(client):
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "stop": None, "seed": None}
    assert chat(client, **ignored)["choices"][0]["message"]["content"] == ANSWER


# ---- operation


def test_models_version_health_and_load(client):
    listed = client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == [MODEL] and client.get(f"/v1/models/{MODEL}").json() == listed["data"][0]
    assert (
        client.get("/health").status_code == client.get("/ping").status_code == 200 and client.get("/version").json()["version"]
    )
    load = client.get("/load").json()
    assert load["unfinished"] == load["running"] == load["waiting"] == 0 and load["free_blocks"] == load["num_blocks"]
    assert client.post("/reset_prefix_cache").status_code == 204


def test_request_ids_are_echoed_when_they_are_plain(client):
    assert client.get("/health", headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    made = client.get("/health", headers={"x-request-id": "a b\tc"}).headers["x-request-id"]
    assert made.startswith("req_") and client.get("/nothing").headers["x-request-id"].startswith("req_")


def test_tokens_and_back(client):
    found = client.post("/tokenize", json={"prompt": "Hello you", "return_token_strs": True}).json()
    assert (
        found["count"] == len(found["tokens"]) and "".join(found["token_strs"]) == "Hello you" and found["max_model_len"] == 1024
    )
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "Hello you"}
    rendered = client.post("/tokenize", json={"messages": QUESTION}).json()["tokens"]
    assert chat(client, return_token_ids=True)["prompt_token_ids"] == rendered
    error(client.post("/tokenize", json={}), 400)
    error(client.post("/detokenize", json={"tokens": [-1]}), 400)


# ---- clients that go


def all_free(client) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        load = client.get("/load").json()
        if load["running"] == load["waiting"] == load["unfinished"] == 0 and load["free_blocks"] == load["num_blocks"]:
            return
        assert time.monotonic() < deadline, load
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_everything(client, server, stream):
    body = json.dumps(
        {"prompt": "Hello", "max_tokens": 1000, "ignore_eos": True, "stream": stream, "n": 2, "temperature": 1}
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=PATIENCE) as gone:
        gone.sendall(head.encode() + body)
        while client.get("/load").json()["running"] < 2:
            pass
    started = time.monotonic()
    all_free(client)
    assert time.monotonic() - started < PATIENCE / 2


def test_a_slow_reader_gets_everything(server):
    async def read() -> str:
        body = {"prompt": "Hello", "max_tokens": 300, "ignore_eos": True, "stream": True, "seed": 1}
        async with httpx.AsyncClient(base_url=server.url, timeout=PATIENCE) as client:
            async with client.stream("POST", "/v1/completions", json=body) as response:
                lines = [line async for line in response.aiter_lines() if line.startswith("data: {")]
            whole = (await client.post("/v1/completions", json={**body, "stream": False})).json()
        assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == whole["choices"][0]["text"]

    asyncio.run(read())


def test_responses_take_the_number_of_drafts(client):
    def say(**body) -> httpx.Response:
        return client.post("/v1/responses", json={"input": "Hello!", "max_output_tokens": 8, "temperature": 0, **body})

    with_drafts, without = (say(**body).json()["output"][0]["content"] for body in ({}, {"max_drafts": 0}))
    assert with_drafts == without and without[0]["text"]
    assert error(say(max_drafts=-1), 400)["param"] == "max_drafts"
