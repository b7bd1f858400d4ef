"""Every family gives transformers' own greedy tokens through the whole engine: batched, in chunks, and after preemption."""

from __future__ import annotations

import pytest
from model_references import CASES, greedy, prompts

from kernel_core import LLM, SamplingParams

PROMPTS, NEW = prompts(1, 9, 3, 30), 8
FAST = ("llama", "gemma3", "mixtral")
ALL_WINDOWS = ("mistral-window", "phi3")  # they give back what left the window, and so never run short
BATCHED, CHUNKED = {"kv_blocks": 64}, {"kv_blocks": 64, "max_tokens_per_step": 7}
PREEMPTED = {"max_model_len": 48, "kv_blocks": 6}  # 5 blocks of 16 tokens: less than the prompts need together


def answers(path: str, **engine) -> tuple[list[list[int]], int]:
    """Greedy tokens of every prompt, and how often a request was preempted."""
    params = SamplingParams(temperature=0, max_tokens=NEW, detokenize=False, ignore_eos=True)
    plugins = {"text": False, "logit_rules": False}
    with LLM(model=path, dtype="float32", max_requests=8, plugins=plugins, **engine) as llm:
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params)
        return [output.outputs[0].token_ids for output in outputs], llm.engine.core.scheduler.preemptions


def cases():
    for name in CASES:
        for label, engine in {"batched": BATCHED, "chunked": CHUNKED, "preempted": PREEMPTED}.items():
            fast = name in FAST and (label == "chunked" or name == "llama")
            yield pytest.param(name, engine, id=f"{name}-{label}", marks=() if fast else pytest.mark.slow)


@pytest.mark.parametrize("name, engine", list(cases()))
def test_greedy_tokens(checkpoint, name: str, engine: dict):
    path, reference = checkpoint(name)
    got, preempted = answers(path, **engine)
    assert got == [greedy(reference, prompt, NEW) for prompt in PROMPTS]
    assert (preempted > 0) == (engine is PREEMPTED and name not in ALL_WINDOWS)
