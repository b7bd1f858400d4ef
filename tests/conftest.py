"""Fixtures that several folders use."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, and other tests' libraries import it

HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 64, 2, 4, 2, 128
SPECIAL = ["<nan>", "<pad>", "<s>", "</s>"]
VOCAB = 256 + len(SPECIAL)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def _weights() -> dict[str, np.ndarray]:
    """Random, but for the embedding of <nan>, which is not a number."""
    draw = np.random.default_rng(0)

    def random(rows: int, columns: int, std: float = 0.25) -> np.ndarray:
        return (draw.standard_normal((rows, columns)) * std).astype(np.float32)

    weights = {f"{name}.weight": random(VOCAB, HIDDEN, 0.6) for name in ("model.embed_tokens", "lm_head")}
    weights["model.embed_tokens.weight"][256] = np.nan
    weights["lm_head.weight"][256] = 0.0  # so that it is hardly ever sampled
    weights["model.norm.weight"] = np.ones(HIDDEN, np.float32)
    head = HIDDEN // HEADS
    shapes = {
        "self_attn.q": (HEADS * head, HIDDEN),
        "self_attn.k": (KV_HEADS * head, HIDDEN),
        "self_attn.v": (KV_HEADS * head, HIDDEN),
    }
    shapes |= {"self_attn.o": (HIDDEN, HIDDEN), "mlp.gate": (FFN, HIDDEN), "mlp.up": (FFN, HIDDEN), "mlp.down": (HIDDEN, FFN)}
    for i in range(LAYERS):
        weights |= {f"model.layers.{i}.{name}_proj.weight": random(*shape) for name, shape in shapes.items()}
        for norm in ("input", "post_attention"):
            weights[f"model.layers.{i}.{norm}_layernorm.weight"] = np.ones(HIDDEN, np.float32)
    return weights


@pytest.fixture(scope="session")
def byte_model(tmp_path_factory) -> Path:
    """A random two-layer Llama checkpoint in fp32 whose tokens are bytes, greedy by default, at most 256 positions."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("models") / "bytes"
    folder.mkdir()
    save_file(_weights(), folder / "model.safetensors", {"format": "pt"})
    sizes = dict(hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KV_HEADS)
    config = dict(
        intermediate_size=FFN, vocab_size=VOCAB, max_position_embeddings=256, rms_norm_eps=1e-5, dtype="float32", **sizes
    )
    config |= dict(model_type="llama", architectures=["LlamaForCausalLM"], rope_theta=1e4, eos_token_id=VOCAB - 1)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "top_k": 7, "max_new_tokens": 40}))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(folder / "tokenizer.json"))
    chat = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(chat))
    return folder
