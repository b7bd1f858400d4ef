"""A draft model proposes what it would say itself, and what is no draft model for the target is refused."""

import json
import shutil

import pytest
import torch
from kernel_draft_model.vocabulary import translation
from kernel_tiny import tiny_draft
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kernel_core import LLM, SamplingParams
from kernel_core.api import ModelInfo
from kernel_core.errors import ConfigError

COMMON = dict(model="tiny-chat", dtype="float32", max_model_len=96, max_requests=4, kv_memory="16MiB", threads=1, device="cpu")
QUESTIONS = [f"<|user|>{text}<|end|><|assistant|>" for text in ("What does os.path.join do?", "Call math.sqrt with 16", "Hello!")]
GREEDY = SamplingParams(temperature=0, max_tokens=16)


def drafting(**section):
    return {"draft_model": {"model": "tiny-draft", "adaptive": False} | section}


def changed(folder, rows=None, ids=None, tokenizer=True):
    """tiny-draft with another number of rows, or with token i called ids[i]."""
    shutil.copytree(tiny_draft(), folder)
    config, path = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens.weight"]
    if rows:
        extra = torch.randn(max(rows - len(table), 0), table.shape[1], generator=torch.Generator().manual_seed(1)) * 5
        table = torch.cat([table, extra.to(table)])[:rows]
    if ids is not None:
        table = torch.empty_like(table).index_copy_(0, ids, table)
        spelled = json.loads((folder / "tokenizer.json").read_text())
        spelled["model"]["vocab"] = {token: int(ids[i]) for token, i in spelled["model"]["vocab"].items()}
        for added in spelled["added_tokens"]:
            added["id"] = int(ids[added["id"]])
        (folder / "tokenizer.json").write_text(json.dumps(spelled))
    if not tokenizer:
        (folder / "tokenizer.json").unlink()
    save_file(tensors | {"model.embed_tokens.weight": table.contiguous()}, path)
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": len(table)}))
    return str(folder)


SHUFFLED = torch.randperm(4096, generator=torch.Generator().manual_seed(2))
SPELLINGS = {
    "its own": ({}, {}),
    "padded": ({"rows": 4160}, {}),
    "shuffled": ({"ids": SHUFFLED}, {"heterogeneous_vocabulary": True}),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_drafts_are_the_greedy_words_of_the_draft_model(tmp_path, name):
    changes, section = SPELLINGS[name]
    section = section | {"model": changed(tmp_path / "draft", **changes)} if changes else section
    reference = AutoModelForCausalLM.from_pretrained(tiny_draft(), dtype=torch.float32)
    seen = []
    with LLM(**COMMON, plugins=drafting(draft_tokens=3, **section)) as llm:
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
    "changes, message",
    [
        ({"rows": 99, "tokenizer": False}, "vocabulary of 99 tokens, the target .* one of 4096"),
        ({"ids": SHUFFLED}, "give the same ids to different tokens.*heterogeneous_vocabulary = true"),
    ],
)
def test_another_vocabulary_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        LLM(**COMMON, plugins=drafting(model=changed(tmp_path / "other", **changes)))


def described(folder, vocab, decoder, size, added=()):
    folder.mkdir()
    added = [{"content": token, "id": number} for token, number in added]
    read = {"model": {"vocab": vocab}, "decoder": {"type": decoder}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(read))
    return ModelInfo(str(folder), "safetensors", {"vocab_size": size})


def test_tokens_of_two_tokenizers_are_joined_by_their_text(tmp_path):
    """Spaces and bytes are spelled in two ways; what the draft model lacks is read as its longest end."""
    draft = described(tmp_path / "d", [["<0x0A>", 0.0], ["\u2581a", 0.0], ["ab", 0.0], ["b", 0.0]], "Metaspace", 6, [("<s>", 4)])
    target = described(tmp_path / "t", {"b": 0, "\u010a": 1, "\u0120a": 2, "xab": 3, "\u00e9": 4}, "ByteLevel", 7, [("<s>", 5)])
    joined = translation(draft, target, True, torch.device("cpu"))
    assert joined.reads.tolist() == [3, 0, 1, 2, 0, 4, 0]
    spread = joined.logits(torch.arange(6.0)[None])
    assert spread.tolist() == [[3.0, 0.0, 1.0, -torch.inf, -torch.inf, 4.0, -torch.inf]]


@pytest.mark.parametrize("size", [5, 9])
def test_two_sizes_of_one_vocabulary_share_the_smaller(tmp_path, size):
    """The same tokens, padded: rows beyond the smaller size are neither drafted nor read."""
    vocab = {"a": 0, "b": 1}
    draft, target = described(tmp_path / "d", vocab, "ByteLevel", size), described(tmp_path / "t", vocab, "ByteLevel", 7)
    joined = translation(draft, target, False, torch.device("cpu"))
    assert joined.reads.tolist() == [min(i, size - 1) for i in range(7)]
    assert joined.logits(torch.arange(float(size))[None]).tolist() == [[float(i) if i < size else -torch.inf for i in range(7)]]
