"""Mistral and Mixtral as data: their configurations and weight names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernel_core.nn.api import (
    DECODER_WEIGHTS,
    Decoder,
    DecoderConfig,
    ModelContext,
    MoEShape,
    layer_types,
    layer_windows,
    read_decoder,
    required,
)

MISTRAL = DECODER_WEIGHTS

_BLOCK, _STACKED = "model.layers.*.block_sparse_moe", "model.layers.*.mlp"
MIXTRAL = {
    **DECODER_WEIGHTS,
    f"{_BLOCK}.gate": "layers.*.mlp.router",
    f"{_BLOCK}.experts.*.w1": "layers.*.mlp.experts:*.gate",
    f"{_BLOCK}.experts.*.w2": "layers.*.mlp.experts:*.down",
    f"{_BLOCK}.experts.*.w3": "layers.*.mlp.experts:*.up",
    f"{_STACKED}.gate": "layers.*.mlp.router",
    f"{_STACKED}.experts.gate_up_proj": "layers.*.mlp.experts:gate+up",
    f"{_STACKED}.experts.down_proj": "layers.*.mlp.experts:down",
}


def _windows(config: Mapping[str, Any]) -> tuple[int | None, ...]:
    sliding = ["sliding_attention"] * required(config, "num_hidden_layers")
    return layer_windows(config, layer_types(config, sliding))


def read_mistral(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json → DecoderConfig. Raises ConfigError for what is not supported."""
    return read_decoder(config, windows=_windows(config))


def read_mixtral(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json → DecoderConfig. Raises ConfigError for what is not supported."""
    shape = MoEShape(
        num_experts=required(config, "num_local_experts"),
        top_k=config.get("num_experts_per_tok", 2),
        intermediate_size=required(config, "intermediate_size"),
    )
    layers = range(required(config, "num_hidden_layers"))
    config = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, **config}
    return read_decoder(config, windows=_windows(config), moe=shape, moe_layers=frozenset(layers))


def build_mistral(ctx: ModelContext) -> Decoder:
    return Decoder(read_mistral(ctx.info.config), ctx)


def build_mixtral(ctx: ModelContext) -> Decoder:
    return Decoder(read_mixtral(ctx.info.config), ctx)
