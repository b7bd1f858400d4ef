"""Gemma 2 and 3 as data: their configurations and weight names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernel_core.api import ConfigError
from kernel_core.nn.api import (
    DECODER_WEIGHTS,
    Decoder,
    DecoderConfig,
    ModelContext,
    layer_types,
    layer_windows,
    read_decoder,
    read_rope,
    required,
)

WEIGHTS = {
    **DECODER_WEIGHTS,
    "model.layers.*.post_attention_layernorm": "layers.*.attention_post_norm",
    "model.layers.*.pre_feedforward_layernorm": "layers.*.mlp_norm",
    "model.layers.*.post_feedforward_layernorm": "layers.*.mlp_post_norm",
}

HEAD_DIM = 256


def _read(config: Mapping[str, Any], types: list[str], **settings: Any) -> DecoderConfig:
    """What the generations share: every other norm, scaled embeddings, tanh-GELU, layers of two types."""
    if config.get("use_bidirectional_attention"):
        raise ConfigError("config.json sets use_bidirectional_attention, which is not supported for generation")
    bias = bool(config.get("attention_bias", False))
    return read_decoder(
        {"tie_word_embeddings": True, "head_dim": HEAD_DIM, **config},
        windows=layer_windows({"sliding_window": 4096, **config}, types),
        activation=config.get("hidden_activation") or "gelu_pytorch_tanh",
        norm_offset=1,
        sandwich=True,
        qkv_bias=bias,
        out_bias=bias,
        scale=float(config.get("query_pre_attn_scalar", 256)) ** -0.5,
        embedding_scale=required(config, "hidden_size") ** 0.5,
        **settings,
    )


def read_gemma2(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json → DecoderConfig: windows on every other layer. Raises ConfigError for what is not supported."""
    alternating = ["full_attention" if i % 2 else "sliding_attention" for i in range(required(config, "num_hidden_layers"))]
    return _read(
        config,
        layer_types(config, alternating),
        soft_cap=config.get("attn_logit_softcapping", 50.0),
        logit_cap=config.get("final_logit_softcapping", 30.0),
    )


def read_gemma3(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json → DecoderConfig: local layers with a rotation of their own. Raises ConfigError for what is not supported."""
    every = config.get("sliding_window_pattern") or 6
    layers = range(required(config, "num_hidden_layers"))
    types = layer_types(config, ["sliding_attention" if (i + 1) % every else "full_attention" for i in layers])
    ropes = _gemma3_ropes(config)
    return _read(
        config,
        types,
        qk_norm=True,
        ropes=tuple(ropes[kind] for kind in types),
        soft_cap=config.get("attn_logit_softcapping"),
        logit_cap=config.get("final_logit_softcapping"),
    )


def _gemma3_ropes(config: Mapping[str, Any]) -> dict[str, Any]:
    """By layer type. Older files state the local base beside the global one, and scale the global one only."""
    dim = config.get("head_dim") or HEAD_DIM
    local = dict(config)
    if not config.get("rope_parameters"):
        local |= {"rope_theta": config.get("rope_local_base_freq", 1e4), "rope_scaling": None}
    return {
        "full_attention": read_rope(config, dim, "full_attention", theta=1e6),
        "sliding_attention": read_rope(local, dim, "sliding_attention", theta=1e4),
    }


def build_gemma2(ctx: ModelContext) -> Decoder:
    return Decoder(read_gemma2(ctx.info.config), ctx)


def build_gemma3(ctx: ModelContext) -> Decoder:
    return Decoder(read_gemma3(ctx.info.config), ctx)
