"""The chat model's drafter heads: published formats, small files, and drafts that the chat model accepts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from safetensors import safe_open

LIMIT = 4_000_000
WANTED = {"tiny-chat-eagle": 2.3, "tiny-chat-eagle3": 2.6, "tiny-chat-mlp": 2.0}
TRAIN = Path(__file__).parents[2] / "models" / "tiny" / "train"
LAYER = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm"]
LAYER += [f"self_attn.{name}_proj" for name in "kqvo"]


def folder(name: str) -> Path:
    (point,) = entry_points(group="kernel_core.checkpoints", name=name)
    return point.load()()


def read(name: str) -> tuple[dict, dict[str, tuple[list[int], str]]]:
    """config.json, and shape and dtype of each tensor."""
    with safe_open(folder(name) / "model.safetensors", framework="pt") as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        tensors = {key: (part.get_shape(), part.get_dtype()) for key, part in parts.items()}
    return json.loads((folder(name) / "config.json").read_text()), tensors


@pytest.mark.parametrize("name", WANTED)
def test_heads_are_small(name):
    _, tensors = read(name)
    assert (folder(name) / "model.safetensors").stat().st_size < LIMIT
    assert {kind for _, kind in tensors.values()} <= {"BF16", "I64", "BOOL"}


def test_eagle_has_one_layer_without_an_input_norm_and_nothing_of_the_target():
    config, tensors = read("tiny-chat-eagle")
    hidden = config["hidden_size"]
    assert set(tensors) == {"fc.weight", *(f"layers.0.{part}.weight" for part in LAYER)}
    assert tensors["fc.weight"][0] == [hidden, 2 * hidden] and config["num_hidden_layers"] == 1


def test_eagle3_reads_three_states_and_drafts_in_a_smaller_vocabulary():
    config, tensors = read("tiny-chat-eagle3")
    hidden, drafted = config["hidden_size"], config["draft_vocab_size"]
    layer = {f"midlayer.{part}.weight" for part in [*LAYER, "input_layernorm", "hidden_norm"]}
    assert set(tensors) == {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d", *layer}
    assert tensors["fc.weight"][0] == [hidden, 3 * hidden] and tensors["lm_head.weight"][0] == [drafted, hidden]
    assert tensors["midlayer.self_attn.q_proj.weight"][0][1] == 2 * hidden
    with safe_open(folder("tiny-chat-eagle3") / "model.safetensors", framework="pt") as file:
        d2t, t2d = file.get_tensor("d2t"), file.get_tensor("t2d")
    assert (d2t + d2t.new_tensor(range(drafted))).tolist() == t2d.nonzero().flatten().tolist()


def test_the_speculator_has_the_published_names():
    config, tensors = read("tiny-chat-mlp")
    assert config["model_type"] == "mlp_speculator" and config["n_predict"] == len(config["top_k_tokens_per_head"]) == 3
    names = {"emb.0.weight", "head.0.weight", "ln.0.weight", "ln.0.bias", "proj.0.weight", "proj.1.weight"}
    assert set(tensors) == {f"speculator.{name}" for name in names} and config["tie_weights"]


@pytest.mark.slow
def test_heads_are_accepted_as_often_as_wanted():
    """By the heads' own formulas in plain torch; no engine is involved."""
    command = [sys.executable, str(TRAIN / "heads.py"), "--only-measure", "--heldout", "120", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    figures = {name: float(figure) for name, figure in re.findall(r"(tiny-chat-\w+): ([\d.]+) tokens a step", done.stdout)}
    assert set(figures) == set(WANTED)
    assert all(figures[name] >= wanted for name, wanted in WANTED.items()), figures
