"""Frequencies of every rotary kind equal transformers', read from either spelling of config.json."""

from __future__ import annotations

import pytest
import torch
from model_references import LLAMA3, LONGROPE, YARN
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from kernel_core.errors import ConfigError
from kernel_core.nn.rope import KINDS, read_rope, rope_tables

DIM, LONGEST = 16, 256
BASE = {"max_position_embeddings": LONGEST, "head_dim": DIM}
PARAMETERS = {
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "yarn": YARN,
    "yarn-fractional": {**YARN, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.0},
    "yarn-mscale": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7},
    "yarn-attention-factor": {**YARN, "attention_factor": 1.7},
    "longrope": {**LONGROPE, "original_max_position_embeddings": 64},
    "longrope-factor": {**LONGROPE, "original_max_position_embeddings": 64, "factor": 8.0},
    "llama3": LLAMA3,
}


def stated(name: str) -> dict:
    return {"rope_theta": 5000.0, **PARAMETERS[name], "rope_type": name.split("-", maxsplit=1)[0]}


@pytest.mark.parametrize("length", [32, 200, 1000])
@pytest.mark.parametrize("name", PARAMETERS)
def test_tables_equal_transformers(name: str, length: int):
    parameters = stated(name)
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=LONGEST, rope_parameters=dict(parameters))
    frequencies, factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, "cpu", seq_len=length)
    angles = torch.outer(torch.arange(length).float(), frequencies)
    cos, sin = rope_tables(read_rope({**BASE, "rope_parameters": parameters}, DIM), length)
    torch.testing.assert_close(cos, angles.cos() * factor, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sin, angles.sin() * factor, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_old_spelling_reads_the_same(name: str):
    parameters = stated(name)
    old = dict(parameters)
    theta, old["type"] = old.pop("rope_theta"), old.pop("rope_type")
    new = read_rope({**BASE, "rope_parameters": parameters}, DIM)
    assert read_rope({**BASE, "rope_theta": theta, "rope_scaling": old}, DIM) == new


def test_defaults_partial_rotation_and_layer_types():
    assert read_rope({**BASE, "rope_scaling": None}, DIM, theta=7.0).theta == 7.0
    assert read_rope({**BASE, "partial_rotary_factor": 0.25}, DIM).dim == 4
    nested = {"full_attention": {"rope_theta": 3.0}, "sliding_attention": {"rope_theta": 2.0}}
    assert read_rope({**BASE, "rope_parameters": nested}, DIM, "sliding_attention").theta == 2.0
    with pytest.raises(ConfigError, match="chunked"):
        read_rope({**BASE, "rope_parameters": nested}, DIM, "chunked")


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"rope_type": "mrope"}, "'mrope'; supported are.*yarn"),
        ({"rope_type": "linear"}, "no `factor`"),
        ({**LONGROPE, "short_factor": [1.0]}, "`short_factor`.*8 numbers, has 1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(parameters: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        read_rope({**BASE, "rope_parameters": parameters}, DIM)


def test_every_kind_is_covered():
    assert {name.split("-")[0] for name in PARAMETERS} | {"default"} == set(KINDS)
