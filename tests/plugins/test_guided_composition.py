"""Guided outputs are the same tokens with drafts, chunks, preemption, the overlapped loop and a worker process as without."""

from __future__ import annotations

import json
from functools import cache

import jsonschema
import pytest

from kernel_core import Engine, SamplingParams

pytest.importorskip("llguidance")
DRAFTS = {"draft_tokens": 4, "adaptive": False}
CALL = {
    "type": "object",
    "properties": {"name": {"enum": ["math.sqrt", "os.path.join"]}, "x": {"type": "string", "maxLength": 12}},
    "required": ["name", "x"],
    "additionalProperties": False,
}
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 6, "maxItems": 8}
PROMPTS = ["What does os.path.join do?", "Call math.sqrt with 16", "one two three one two three one two", "Hi"]
REQUESTS = [
    dict(structured_outputs={"json": CALL}, temperature=0.0),
    dict(structured_outputs={"json": NUMBERS}, temperature=1.5, seed=3, n=2),
    dict(structured_outputs={"regex": "(one two ){3,5}three"}, temperature=0.8, seed=4),
    dict(temperature=0.9, seed=5),
]
SETTINGS = {
    "ngram": dict(plugins={"ngram": DRAFTS}),
    "mlp": dict(plugins={"mlp_speculator": {"head": "tiny-chat-mlp", "draft_tokens": 3, "adaptive": False}}),
    "eagle": dict(plugins={"eagle": {"head": "tiny-chat-eagle", **DRAFTS}}),
    "eagle3 tree": dict(plugins={"eagle": {"head": "tiny-chat-eagle3", "tree": True, "draft_tokens": 8, "adaptive": False}}),
    "draft model": dict(plugins={"draft_model": {"model": "tiny-draft", **DRAFTS}}),
    "chunked": dict(max_tokens_per_step=7),
    "preempted": dict(kv_blocks=9, max_model_len=128),
    "prefixes": dict(plugins={"prefix_caching": {}}),
    "overlapped": dict(overlap=True),
    "overlapped drafts": dict(overlap=True, plugins={"eagle": {"head": "tiny-chat-eagle", **DRAFTS}}),
    "worker process": dict(executor="worker_process"),
}


def run(**settings):
    plugins = {"guided_decoding": {}, "prefix_caching": False, **settings.pop("plugins", {})}
    keys = dict(model="tiny-chat", device="cpu", dtype="float32", max_requests=8, max_model_len=256) | settings
    outputs = {}
    with Engine(**keys, plugins=plugins) as engine:
        for number, (prompt, given) in enumerate(zip(PROMPTS, REQUESTS)):
            engine.add_request(str(number), prompt, engine.intake.params(max_tokens=60, **given))
        while engine.has_unfinished_requests():
            outputs.update((output.request_id, output) for output in engine.step())
        engine.core.scheduler.check()
    return {(name, o.index): (o.token_ids, o.text, o.finish_reason) for name, output in outputs.items() for o in output.outputs}


@cache
def plain():
    return run()


def test_plain_outputs_are_valid():
    found = plain()
    for place, schema in {("0", 0): CALL, ("1", 0): NUMBERS, ("1", 1): NUMBERS}.items():
        _, text, reason = found[place]
        assert reason == "stop"
        jsonschema.validate(json.loads(text), schema)


FAST = ("ngram", "eagle3 tree", "chunked", "preempted", "overlapped")


@pytest.mark.parametrize("name", FAST)
def test_same_tokens(name):
    assert run(**SETTINGS[name]) == plain()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in FAST])
def test_same_tokens_slow(name):
    assert run(**SETTINGS[name]) == plain()


def test_a_slow_grammar_stalls_nobody(monkeypatch):
    """While it compiles the other requests run to their end; after its time it ends with the reason."""
    from threading import Event

    from kernel_guided_decoding.compiler import Compiler

    compile_now, gate = Compiler._compile, Event()

    def held(self, data):
        if b"slow" in data:
            gate.wait(20)
        return compile_now(self, data)

    monkeypatch.setattr(Compiler, "_compile", held)
    with Engine(model="tiny-chat", device="cpu", plugins={"guided_decoding": {"compile_seconds": 0.5}}) as engine:
        engine.add_request("slow", "Hi", SamplingParams.of(structured_outputs={"choice": ["slow"]}))
        engine.add_request("quick", "Hi", SamplingParams.of(structured_outputs={"choice": ["quick"]}))
        outputs, order = {}, []
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    outputs[output.request_id] = output
                    order.append(output.request_id)
        gate.set()
    assert order == ["quick", "slow"]
    assert outputs["quick"].outputs[0].text == "quick" and "0.5 s to compile" in outputs["slow"].error


def test_a_tokenizer_that_the_back_end_cannot_read(tmp_path):
    from kernel_guided_decoding.compiler import load_tokenizer

    from kernel_core import RequestError

    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": {}}')
    with pytest.raises(RequestError, match="guided decoding is unavailable for this tokenizer"):
        load_tokenizer(file, 10, [1])
