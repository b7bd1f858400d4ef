"""With drafts, tokens have the distribution that the target gives them: a chi-square test against transformers' probabilities."""

from collections import Counter

import numpy as np
import pytest
import torch
from kernel_tiny import tiny_chat
from transformers import AutoModelForCausalLM, AutoTokenizer

from kernel_core import Engine, SamplingParams

PROMPT = "<|user|>What does os.path.join do?<|end|><|assistant|>"
TEMPERATURE, REQUESTS = 1.7, 24_000
DRAFTERS = {
    "draft model": {"draft_model": {"model": "tiny-draft", "draft_tokens": 2, "adaptive": False}},
    "eagle3 tree": {"eagle": {"head": "tiny-chat-eagle3", "tree": True, "draft_tokens": 8, "adaptive": False}},
}


@pytest.fixture(scope="module")
def target():
    model = AutoModelForCausalLM.from_pretrained(tiny_chat(), dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(tiny_chat())(PROMPT).input_ids


@torch.no_grad()
def probabilities(model, ids):
    return (model(torch.tensor([ids])).logits[0, -1].double() / TEMPERATURE).softmax(-1).numpy()


def check(counts, expected, total):
    """Tokens expected fewer than ten times count as one. Fails about once in 10,000 times by chance."""
    often = expected * total >= 10
    seen, wanted = counts[often], expected[often] * total
    seen, wanted = np.append(seen, total - seen.sum()), np.append(wanted, total - wanted.sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic, freedom = ((seen - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    assert freedom > 3 and statistic < freedom + 4 * np.sqrt(2 * freedom) + 4, (statistic, freedom)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_drafts_do_not_change_the_distribution(drafter, target):
    model, prompt = target
    first, second = Counter(), Counter()
    common = dict(dtype="float32", max_model_len=64, max_requests=256, kv_memory="512MiB", device="cpu")
    with Engine(model="tiny-chat", plugins=DRAFTERS[drafter], **common) as engine:
        for number in range(REQUESTS):
            params = SamplingParams(temperature=TEMPERATURE, max_tokens=3, ignore_eos=True, seed=number, detokenize=False)
            engine.add_request(str(number), prompt, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    a, b, _ = output.outputs[0].token_ids
                    first[a] += 1
                    second[a, b] += 1
        accepted = engine.outputs.drafts.accepted
    assert sum(first.values()) == REQUESTS and accepted > 500
    expected = probabilities(model, prompt)
    check(np.array([first[token] for token in range(len(expected))]), expected, REQUESTS)
    common_first, total = first.most_common(1)[0]
    expected = probabilities(model, [*prompt, common_first])
    check(np.array([second[common_first, token] for token in range(len(expected))]), expected, total)
