"""What is sampled from, field by field, against transformers' own logits processors on transformers' own logits."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_tiny import tiny_chat
from transformers import AutoModelForCausalLM
from transformers.generation import logits_process as hf

from kernel_core import LLM

PROMPT = [867, 6, 3981, 347, 455, 264, 346, 300, 411, 867, 6]
END = 1
NEW = 5


def suppressed(allowed: list[int], vocabulary: int) -> hf.SuppressTokensLogitsProcessor:
    return hf.SuppressTokensLogitsProcessor([token for token in range(vocabulary) if token not in allowed])


# Fields of a request → the processors that transformers' generate makes of the same settings, in its order.
CASES = {
    "temperature": (dict(temperature=0.6), [hf.TemperatureLogitsWarper(0.6)]),
    "top_k": (dict(temperature=1.3, top_k=7), [hf.TemperatureLogitsWarper(1.3), hf.TopKLogitsWarper(7)]),
    "top_p": (dict(temperature=1.5, top_p=0.8), [hf.TemperatureLogitsWarper(1.5), hf.TopPLogitsWarper(0.8)]),
    "top_k and top_p": (
        dict(temperature=2.0, top_k=20, top_p=0.7),
        [hf.TemperatureLogitsWarper(2.0), hf.TopKLogitsWarper(20), hf.TopPLogitsWarper(0.7)],
    ),
    "min_p": (dict(temperature=1.5, min_p=0.02), [hf.TemperatureLogitsWarper(1.5), hf.MinPLogitsWarper(0.02)]),
    "min_p and top_k": (
        dict(temperature=2.0, min_p=0.001, top_k=9),
        [hf.TemperatureLogitsWarper(2.0), hf.TopKLogitsWarper(9), hf.MinPLogitsWarper(0.001)],
    ),
    "repetition_penalty": (
        dict(repetition_penalty=1.4, temperature=0.9),
        [hf.RepetitionPenaltyLogitsProcessor(1.4), hf.TemperatureLogitsWarper(0.9)],
    ),
    "min_tokens": (dict(min_tokens=3), [hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), 3, [END])]),
    "allowed_token_ids": (dict(allowed_token_ids=[5, 300, 411, 867]), [suppressed([5, 300, 411, 867], 4096)]),
    "logit_bias": (
        dict(logit_bias={411: 4.0, 6: -2.5}),
        [hf.SequenceBiasLogitsProcessor([[[411], 4.0], [[6], -2.5]])],
    ),
}


@pytest.fixture(scope="module")
def llm():
    with LLM("tiny-chat", device="cpu", dtype="float32", logprobs_mode="processed_logprobs", max_logprobs=-1) as made:
        yield made


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(tiny_chat(), dtype=torch.float32).eval()


def expected(model, processors: list, ids: list[int]) -> torch.Tensor:
    """[V] log-probabilities of the token after `ids`."""
    row = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(row).logits[:, -1].float()
    return hf.LogitsProcessorList(processors)(row, logits).log_softmax(-1)[0]


def compare(llm, model, fields: dict, processors: list, prompt: list[int] = PROMPT) -> None:
    (output,) = llm.generate([prompt], logprobs=-1, max_tokens=NEW, seed=3, **{"temperature": 1.0, **fields})
    completion = output.outputs[0]
    for i, entry in enumerate(completion.logprobs):
        wanted = expected(model, processors, prompt + completion.token_ids[:i])
        got = torch.tensor([entry[token].logprob if token in entry else -math.inf for token in range(wanted.numel())])
        assert torch.equal(got.isinf(), wanted.isinf()), f"position {i} keeps other tokens"
        kept = wanted.isfinite()
        torch.testing.assert_close(got[kept], wanted[kept], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("case", CASES)
def test_what_is_sampled_from_is_what_transformers_makes_of_the_same_fields(llm, model, case):
    compare(llm, model, *CASES[case])


def test_bad_words_are_those_of_transformers_also_when_they_are_several_tokens(llm, model):
    codec = llm.engine.codec
    prompt = codec.apply_chat_template([{"role": "user", "content": "What does os.path.join do?"}])
    (free,) = llm.generate([prompt], temperature=0, max_tokens=NEW)
    banned = codec.decode(free.outputs[0].token_ids[:2])
    spellings = [codec.encode(text, add_special_tokens=False) for text in (banned, f" {banned}")]
    assert max(map(len, spellings)) > 1
    compare(llm, model, dict(bad_words=[banned]), [hf.NoBadWordsLogitsProcessor(spellings, END)], prompt)
