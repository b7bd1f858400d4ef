"""Phi-3 as data: its configuration and its weight names, which are fused in the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernel_core.nn.api import DECODER_WEIGHTS, Decoder, DecoderConfig, ModelContext, layer_windows, read_decoder, required

WEIGHTS = {
    **DECODER_WEIGHTS,
    "model.layers.*.self_attn.qkv_proj": "layers.*.attention.qkv:q+k+v",
    "model.layers.*.mlp.gate_up_proj": "layers.*.mlp.gate_up:gate+up",
}

ORIGINAL_POSITIONS = 4096  # when config.json does not state it
LONGROPE_NAMES = ("su", "yarn")  # what the first checkpoints called it


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json → DecoderConfig. Raises ConfigError for what is not supported."""
    config = {"original_max_position_embeddings": ORIGINAL_POSITIONS, "rms_norm_eps": 1e-5, **config}
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if (rope.get("rope_type") or rope.get("type")) in LONGROPE_NAMES:
        rope["rope_type"] = "longrope"
    config["rope_parameters"] = rope
    windows = layer_windows(config, ["sliding_attention"] * required(config, "num_hidden_layers"))
    return read_decoder(config, windows=windows)


def build(ctx: ModelContext) -> Decoder:
    return Decoder(read(ctx.info.config), ctx)
