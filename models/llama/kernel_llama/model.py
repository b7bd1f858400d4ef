"""Llama as data: its configuration and its weight names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kernel_core.nn.api import DECODER_WEIGHTS, Decoder, DecoderConfig, ModelContext, read_decoder

WEIGHTS = DECODER_WEIGHTS


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json → DecoderConfig. Raises ConfigError for what is not supported."""
    bias = bool(config.get("attention_bias", False))
    return read_decoder(config, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias", False)))


def build(ctx: ModelContext) -> Decoder:
    return Decoder(read(ctx.info.config), ctx)
