"""Every family gives transformers' own greedy tokens and log-probabilities: batched, in chunks, and after preemption."""

from __future__ import annotations

import random

import pytest
from model_references import CASES, greedy

from kernel_core import LLM, SamplingParams

LENGTHS = (1, 9, 3, 30)
NEW = 12


def prompts() -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(2, 160) for _ in range(n)] for n in LENGTHS]


def answers(path: str, **keys) -> list[tuple[list[int], list[float]]]:
    plugins = {"text": False, "logit_rules": False}
    params = SamplingParams(temperature=0, max_tokens=NEW, detokenize=False, ignore_eos=True, logprobs=0)
    with LLM(model=path, dtype="float32", max_requests=8, plugins=plugins, **keys) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts()], params)
        preempted = llm.engine.core.scheduler.preemptions
    completions = [output.outputs[0] for output in outputs]
    values = [[entry[t].logprob for t, entry in zip(c.token_ids, c.logprobs)] for c in completions]
    return [(c.token_ids, v) for c, v in zip(completions, values)], preempted


def expect(got, model) -> None:
    for prompt, (tokens, values) in zip(prompts(), got):
        want_tokens, want_values = greedy(model, prompt, NEW)
        assert tokens == want_tokens
        assert values == pytest.approx(want_values, abs=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_batched(checkpoint, name: str):
    path, model = checkpoint(name)
    expect(answers(path)[0], model)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2", "mixtral"])
def test_in_chunks_of_a_small_budget(checkpoint, name: str):
    path, model = checkpoint(name)
    expect(answers(path, max_tokens_per_step=7)[0], model)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_preempted_by_a_pool_too_small_for_all(checkpoint, name: str):
    path, model = checkpoint(name)
    got, preempted = answers(path, max_model_len=48, kv_blocks=6)
    expect(got, model)
    assert preempted > 0
