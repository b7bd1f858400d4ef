"""A draft model proposes what it would say itself, and what is no draft model for the target is refused."""

import json
import shutil

import pytest
import torch
from kernel_tiny import tiny_draft
from transformers import AutoModelForCausalLM

from kernel_core import LLM, SamplingParams
from kernel_core.errors import ConfigError

COMMON = dict(model="tiny-chat", dtype="float32", max_model_len=96, max_requests=4, kv_memory="16MiB", threads=1, device="cpu")
QUESTIONS = [f"<|user|>{text}<|end|><|assistant|>" for text in ("What does os.path.join do?", "Call math.sqrt with 16", "Hello!")]
GREEDY = SamplingParams(temperature=0, max_tokens=16)


def drafting(**section):
    return {"draft_model": {"model": "tiny-draft", "adaptive": False} | section}


def test_drafts_are_the_greedy_words_of_the_draft_model():
    reference = AutoModelForCausalLM.from_pretrained(tiny_draft(), dtype=torch.float32)
    seen = []
    with LLM(**COMMON, plugins=drafting(draft_tokens=3)) as llm:
        drafter = llm.engine.core.executor._worker.drafter
        propose = drafter.propose

        def proposing(view):
            tokens, parents, count = propose(view)
            if view.host_sampled.any():
                seen.append((int(view.known[0]), tokens[0].tolist()))
            return tokens, parents, count

        drafter.propose = proposing
        (output,) = llm.generate(QUESTIONS[:1], GREEDY)
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    compared = [(known, tokens) for known, tokens in seen if known <= len(ids)]
    assert len(compared) > 3
    for known, tokens in compared:
        said = reference.generate(
            torch.tensor([ids[:known]]), max_new_tokens=3, min_new_tokens=3, do_sample=False, eos_token_id=[]
        )
        assert tokens == said[0, known:].tolist()


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_a_draft_model_that_is_the_target_is_always_right(temperature):
    params = SamplingParams(temperature=temperature, max_tokens=16, seed=5, ignore_eos=True)
    with LLM(**COMMON, plugins=drafting(model="tiny-chat", draft_tokens=3)) as llm:
        outputs = [output.outputs[0] for output in llm.generate(QUESTIONS, params)]
    for one in outputs:
        assert one.num_drafted == one.num_accepted > 0
        assert len(one.token_ids) == 16


def test_drafts_stop_where_the_draft_model_ends(tmp_path):
    """A draft model made for 40 positions says nothing about the rest of a longer request."""
    folder = tmp_path / "short"
    shutil.copytree(tiny_draft(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with LLM(**COMMON) as llm:
        (plain,) = llm.generate(QUESTIONS[:1], params)
    with LLM(**COMMON, plugins=drafting(model=str(folder))) as llm:
        (output,) = llm.generate(QUESTIONS[:1], params)
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert 0 < output.outputs[0].num_drafted <= 40


@pytest.mark.parametrize(
    "change, message",
    [("size", "vocabulary of 99 tokens, the target one of 4096"), ("ids", "give the same ids to different tokens")],
)
def test_another_vocabulary_is_refused(tmp_path, change, message):
    folder = tmp_path / "other"
    shutil.copytree(tiny_draft(), folder)
    if change == "size":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 99}))
    else:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        vocab = tokenizer["model"]["vocab"]
        one, two = list(vocab)[300:302]
        vocab[one], vocab[two] = vocab[two], vocab[one]
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=message):
        LLM(**COMMON, plugins=drafting(model=str(folder)))
