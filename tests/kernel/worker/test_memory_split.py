"""Sizes, the memory split and the compute dtype are decided from data, and say what is wrong when they cannot be."""

import pytest
import torch
from torch import nn

from kernel_core.config import EngineConfig
from kernel_core.errors import CapacityError, ConfigError
from kernel_core.nn.memory import activation_bytes, parse_bytes, split_memory, weight_bytes
from kernel_core.nn.protocols import MemoryReport

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 * GIB), ("512 MB", 512 * 10**6), ("1000", 1000), ("1.5k", 1500), ("4gi", 4 * GIB), ("10B", 10)]
)
def test_sizes_are_read_in_the_usual_spellings(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 bananas", "-1GB", "1ib"])
def test_other_spellings_are_refused(text):
    with pytest.raises(ConfigError, match="2GiB"):
        parse_bytes(text)


def test_shared_weights_are_counted_once():
    model = nn.ModuleDict({"a": nn.Embedding(10, 4), "b": nn.Linear(4, 10, bias=False)})
    model["b"].weight = model["a"].weight
    assert weight_bytes(model) == 10 * 4 * 4


def test_activations_grow_with_the_step_and_leave_the_vocabulary_to_the_logits():
    model = nn.ModuleDict({"embed": nn.Embedding(1000, 8), "up": nn.Linear(8, 32)})
    small, large = (activation_bytes(model, torch.float32, tokens, 1, 1000) for tokens in (1, 101))
    assert (large - small) % (100 * 32 * 4) == 0 and large > small
    assert small >= 1000 * 4


@pytest.mark.parametrize(
    ("config", "limit", "kv"),
    [
        ({"memory_fraction": 0.5}, None, 3 * GIB),
        ({"memory_fraction": 0.5}, GIB, GIB),
        ({"kv_memory": "2GiB"}, GIB, 2 * GIB),
    ],
)
def test_kv_gets_what_is_asked_or_what_is_left(config, limit, kv):
    split = split_memory(EngineConfig(**config), MemoryReport(16 * GIB, 8 * GIB, limit), 4 * GIB, GIB)
    assert split.kv == kv and split.as_mapping()["weights"] == 4 * GIB


@pytest.mark.parametrize("config", [{"memory_fraction": 0.1}, {"kv_memory": "9GiB"}])
def test_no_room_is_said_with_the_figures(config):
    with pytest.raises(CapacityError, match=r"8\.00 GiB"):
        split_memory(EngineConfig(**config), MemoryReport(16 * GIB, 8 * GIB), 4 * GIB, GIB)
