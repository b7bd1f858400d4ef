"""Guided outputs are the same tokens with drafts, chunks, preemption, the overlapped loop and a worker process as without."""

from __future__ import annotations

import json
from functools import cache

import jsonschema
import numpy as np
import pytest
from guided_walks import BOTH, allowed, matcher, needs_xgrammar, tokenizer

from kernel_core import Engine, RequestError, SamplingParams

pytest.importorskip("llguidance")
DRAFTS = {"draft_tokens": 4, "adaptive": False}
CALL = {
    "type": "object",
    "properties": {"name": {"enum": ["math.sqrt", "os.path.join"]}, "x": {"type": "string", "maxLength": 6}},
    "required": ["name", "x"],
    "additionalProperties": False,
}
NUMBERS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 3, "maxItems": 4}
PROMPTS = ["What does os.path.join do?", "Call math.sqrt with 16", "one two three one two three one two", "Hi"]
REQUESTS = [
    dict(structured_outputs={"json": CALL}, temperature=0.0),
    dict(structured_outputs={"json": NUMBERS}, temperature=1.5, seed=3, n=2),
    dict(structured_outputs={"regex": "(one two ){2,3}three"}, temperature=0.8, seed=4),
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


def run(backend="llguidance", **settings):
    plugins = {"guided_decoding": {"backend": backend}, "prefix_caching": False, **settings.pop("plugins", {})}
    keys = dict(model="tiny-chat", device="cpu", dtype="float32", max_requests=8, max_model_len=256) | settings
    outputs = {}
    with Engine(**keys, plugins=plugins) as engine:
        for number, (prompt, given) in enumerate(zip(PROMPTS, REQUESTS)):
            engine.add_request(str(number), prompt, engine.intake.params(max_tokens=40, **given))
        while engine.has_unfinished_requests():
            outputs.update((output.request_id, output) for output in engine.step())
        engine.core.scheduler.check()
    return {(name, o.index): (o.token_ids, o.text, o.finish_reason) for name, output in outputs.items() for o in output.outputs}


@cache
def plain(backend):
    return run(backend)


@pytest.mark.parametrize("backend", BOTH)
def test_plain_outputs_are_valid(backend):
    found = plain(backend)
    for place, schema in {("0", 0): CALL, ("1", 0): NUMBERS, ("1", 1): NUMBERS}.items():
        _, text, reason = found[place]
        assert reason == "stop"
        jsonschema.validate(json.loads(text), schema)


FAST = {("llguidance", "ngram"), ("llguidance", "preempted"), ("xgrammar", "ngram"), ("xgrammar", "overlapped")}
CASES = [(backend, name) for backend in ("llguidance", "xgrammar") for name in SETTINGS]


@pytest.mark.parametrize(
    ("backend", "name"),
    [pytest.param(*c, marks=[needs_xgrammar] * (c[0] == "xgrammar") + [pytest.mark.slow] * (c not in FAST)) for c in CASES],
)
def test_same_tokens(backend, name):
    assert run(backend, **SETTINGS[name]) == plain(backend)


@pytest.mark.parametrize("backend", BOTH)
def test_the_masks_of_a_tree_are_those_of_its_paths(backend):
    """Drafts of which the grammar refuses some, in trees of any shape; afterwards the matcher is where it was."""
    from kernel_guided_decoding.masks import Guided, fill_tree

    draw, size = np.random.default_rng(3), tokenizer()[3]
    first = matcher(backend, "json_schema", CALL)
    ends = frozenset(tokenizer()[2])
    for _ in range(12):
        guided = Guided(first.copy(), ends, np.zeros(0, np.int64))
        parents = [int(draw.integers(-1, draft)) if draft else -1 for draft in range(6)]
        drafts, paths = [], []
        for number, parent in enumerate(parents):
            before, at = [] if parent < 0 else paths[parent], first.copy()
            assert at.advance([drafts[i] for i in before or ()]) == ""
            token = int(draw.choice(allowed(at))) if draw.random() < 0.8 else int(draw.integers(size))
            follows = before is not None and token not in ends and at.try_advance(token)
            drafts.append(token)
            paths.append([*before, number] if follows else None)
        rows = np.full((7, (size + 31) // 32), np.uint32(0xFFFFFFFF))
        fill_tree(guided, drafts, parents, rows)
        wanted = np.full_like(rows, np.uint32(0xFFFFFFFF))
        for row, path in enumerate([[], *paths]):
            if path is not None:
                at = first.copy()
                assert at.advance([drafts[number] for number in path]) == "" and at.fill(wanted[row]) == ""
        assert (rows == wanted).all() and guided.problem == ""
        assert (allowed(guided.matcher) == allowed(first)).all()
        first.advance([int(draw.choice(allowed(first)))])


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


@pytest.mark.parametrize("backend", BOTH)
def test_a_matcher_that_fails_ends_its_request_with_the_reason(backend, monkeypatch):
    """The others of the step go on."""
    from kernel_guided_decoding.masks import Guided

    advance = Guided.advance

    def astray(self, tokens):
        advance(self, [2] if len(tokens) and self.extra.size else tokens)  # a token of no text

    monkeypatch.setattr(Guided, "advance", astray)
    keys = dict(model="tiny-chat", device="cpu", plugins={"guided_decoding": {"backend": backend}})
    with Engine(**keys) as engine:
        form = dict(structured_outputs={"regex": "[a-z]{9}"}, temperature=0.0)
        engine.add_request("astray", "Hi", engine.intake.params(**form, stop_token_ids=[300]))
        engine.add_request("good", "Hi", engine.intake.params(**form))
        outputs = {}
        while engine.has_unfinished_requests():
            outputs.update((output.request_id, output) for output in engine.step())
        engine.core.scheduler.check()
    assert "the grammar cannot be followed any further" in outputs["astray"].error and outputs["good"].error is None
    assert len(outputs["good"].outputs[0].text) == 9


@pytest.mark.parametrize("backend", BOTH)
def test_a_tokenizer_that_the_back_end_cannot_read(backend, tmp_path):
    from kernel_guided_decoding.backends import load

    file = tmp_path / "tokenizer.json"
    file.write_text('{"model": {}}')
    with pytest.raises(RequestError, match="guided decoding is unavailable for this tokenizer"):
        load(backend).tokens(file, 10, [1], 1)
