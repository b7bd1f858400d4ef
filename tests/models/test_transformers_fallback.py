"""Architectures without a family of their own run through transformers on the paged KV, or are refused with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dense_harness import load, ragged_logits
from kernel_transformers_any.attention import mask_window
from model_references import edit_config, greedy, prompts, reference_logits, write_checkpoint
from test_families import BATCHED, CHUNKED, NEW, PREEMPTED, PROMPTS, answers
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from kernel_core.errors import ConfigError

GPT2 = ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128})
GPT_OSS = (
    "gpt_oss",
    {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
)
LATENT = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = (
    "deepseek_v3",
    {
        **LATENT,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
)
ANY = {
    "gpt2": GPT2,  # learned positions, one fused projection, old tensor names
    "gpt_oss": GPT_OSS,  # attention sinks, windows on every other layer, experts
    "cohere": ("cohere", {"logit_scale": 0.5}),  # scales its logits after the head
    "gpt_neox": ("gpt_neox", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 2.0, "embedding_multiplier": 3.0}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "deepseek_v3": DEEPSEEK,  # values smaller than keys
}
FAST = ("gpt2", "gpt_oss", "cohere")


def marked(names):
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def fallback(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            made[name] = (str(path), write_checkpoint(path, *ANY[name]))
        return made[name]

    return get


@pytest.mark.parametrize("name", marked(ANY))
def test_logits(fallback, name: str):
    path, reference = fallback(name)
    given = prompts(1, 13, 30)
    for prompt, logits in zip(given, ragged_logits(load(path), given, 9), strict=True):
        torch.testing.assert_close(logits, reference_logits(reference, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", marked(ANY))
def test_greedy_tokens_through_the_engine(fallback, name: str):
    path, reference = fallback(name)
    want = [greedy(reference, prompt, NEW) for prompt in PROMPTS]
    for engine in (BATCHED, CHUNKED, PREEMPTED) if name not in FAST else (CHUNKED,):
        got, preempted = answers(path, **engine)
        assert got == want
        assert (preempted > 0) == (engine is PREEMPTED and name != "starcoder2")  # whose layers all have windows


def test_layers_are_learnt_from_the_model(fallback):
    from kernel_core.nn.kv import attention_specs

    window, full = attention_specs(load(fallback("gpt_oss")[0]))
    assert (window.kind, window.window, full.kind, full.window) == ("window", 8, "full", None)
    assert window.sinks and (window.num_heads, window.num_kv_heads, window.head_dim) == (4, 2, 16)
    assert window.layer != full.layer


def test_random_weights_are_seeded(fallback):
    one, other = (ragged_logits(load(fallback("gpt2")[0], random_weights=True), prompts(3), 9)[0] for _ in range(2))
    assert torch.equal(one, other) and one.isfinite().all()


REFUSED = {
    "mamba": ("mamba", {}, "2 layers, 0 of them attention.*family of their own"),
    "bloom": ("bloom", {"n_layer": 2, "n_head": 4}, "0 of them attention"),
    "falcon": ("falcon", {}, "cannot build"),
    "llama4": (
        "llama4_text",
        {"head_dim": 16, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8},
        "neither causal nor a sliding window",
    ),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in ("mamba", "llama4") else pytest.mark.slow) for n in REFUSED])
def test_refused_with_the_reason(tmp_path, name: str):
    *case, message = REFUSED[name]
    write_checkpoint(tmp_path, *case)
    with pytest.raises(ConfigError, match=message):
        load(str(tmp_path))


def test_remote_code_is_not_run(tmp_path, checkpoint):
    path, _ = checkpoint("llama")
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((Path(path) / file).read_bytes())
    (tmp_path / "evil.py").write_text("raise SystemExit('remote code ran')")
    auto = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}
    edit_config(str(tmp_path), model_type="evil", architectures=["EvilForCausalLM"], auto_map=auto)
    with pytest.raises(ConfigError, match=r"trust_remote_code=True"):
        load(str(tmp_path))


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    write_checkpoint(tmp_path, *GPT2)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"missing_keys.*h\.1\.mlp\.c_fc\.weight"):
        load(str(tmp_path))


@pytest.mark.parametrize("window", [1, 2, 8, 4096])
def test_a_window_is_read_from_a_mask_function(window: int):
    assert mask_window(sliding_window_causal_mask_function(window)) == window


def test_other_masks_are_told_apart():
    assert mask_window(causal_mask_function) is None
    for function in (
        chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.int64)),
        sliding_window_bidirectional_mask_function(8),
    ):
        with pytest.raises(ConfigError, match="neither"):
            mask_window(function)
