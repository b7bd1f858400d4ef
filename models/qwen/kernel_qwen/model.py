"""Qwen2, Qwen3 and Qwen3-MoE as data: their configurations and weight names."""

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

DENSE = DECODER_WEIGHTS

_MLP = "model.layers.*.mlp"
MOE = {
    **DECODER_WEIGHTS,
    f"{_MLP}.gate": "layers.*.mlp.router",
    f"{_MLP}.experts.*.gate_proj": "layers.*.mlp.experts:*.gate",
    f"{_MLP}.experts.*.up_proj": "layers.*.mlp.experts:*.up",
    f"{_MLP}.experts.*.down_proj": "layers.*.mlp.experts:*.down",
    f"{_MLP}.experts.gate_up_proj": "layers.*.mlp.experts:gate+up",
    f"{_MLP}.experts.down_proj": "layers.*.mlp.experts:down",
}


def _windows(config: Mapping[str, Any], first_sliding: int) -> tuple[int | None, ...]:
    """Windows are off unless `use_sliding_window`; then layers from `first_sliding` on have one."""
    layers = required(config, "num_hidden_layers")
    if not config.get("use_sliding_window"):
        return (None,) * layers
    default = ["sliding_attention" if index >= first_sliding else "full_attention" for index in range(layers)]
    return layer_windows(config, layer_types(config, default))


def read_qwen2(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json → DecoderConfig. Raises ConfigError for what is not supported."""
    return read_decoder(config, qkv_bias=True, windows=_windows(config, config.get("max_window_layers", 28)))


def _qwen3(config: Mapping[str, Any], **settings: Any) -> DecoderConfig:
    bias = bool(config.get("attention_bias", False))
    return read_decoder(config, qk_norm=True, qkv_bias=bias, out_bias=bias, **settings)


def read_qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json → DecoderConfig. Raises ConfigError for what is not supported."""
    windows = _windows(config, config.get("max_window_layers", 28))
    return _qwen3(config, head_dim=config.get("head_dim") or 128, windows=windows)


def read_qwen3_moe(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json → DecoderConfig. Raises ConfigError for what is not supported."""
    shape = MoEShape(
        num_experts=config.get("num_local_experts") or required(config, "num_experts"),
        top_k=required(config, "num_experts_per_tok"),
        intermediate_size=required(config, "moe_intermediate_size"),
        renormalise=bool(config.get("norm_topk_prob", False)),
    )
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    layers = range(required(config, "num_hidden_layers"))
    sparse = frozenset(index for index in layers if index not in dense and (index + 1) % step == 0)
    return _qwen3(config, moe=shape, moe_layers=sparse, windows=_windows(config, 0))


def build_qwen2(ctx: ModelContext) -> Decoder:
    return Decoder(read_qwen2(ctx.info.config), ctx)


def build_qwen3(ctx: ModelContext) -> Decoder:
    return Decoder(read_qwen3(ctx.info.config), ctx)


def build_qwen3_moe(ctx: ModelContext) -> Decoder:
    return Decoder(read_qwen3_moe(ctx.info.config), ctx)
