"""A value of config.json that a family does not support is refused with a sentence that names it."""

from __future__ import annotations

import pytest
from dense_harness import load
from model_references import CASES, edit_config, write_checkpoint

from kernel_core.errors import ConfigError

REFUSED = [
    ("llama", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu'; supported are.*silu"),
    ("llama", {"hidden_act": "relu"}, "gated 'relu'"),
    ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type 'proportional'; supported are"),
    ("llama", {"vocab_size": None}, "does not state 'vocab_size'"),
    ("qwen3", {"use_sliding_window": True, "layer_types": ["chunked_attention", "full_attention"]}, "types.*chunked_attention"),
    ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine"),
    ("opt", {"activation_function": "mish"}, "activation 'mish'"),
]


@pytest.mark.parametrize("name, changes, message", REFUSED)
def test_refused(tmp_path, name: str, changes: dict, message: str):
    write_checkpoint(tmp_path, *CASES[name])
    edit_config(str(tmp_path), **changes)
    with pytest.raises(ConfigError, match=message):
        load(str(tmp_path))
