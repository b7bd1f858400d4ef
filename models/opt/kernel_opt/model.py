"""OPT: learned positions, layer norms before or after, a plain MLP. Built from the kernel's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernel_core.api import ConfigError
from kernel_core.nn.api import (
    Attention,
    AttentionShape,
    Forward,
    LayerNorm,
    Linear,
    LogitsHead,
    ModelContext,
    Taps,
    VocabEmbedding,
    activation_op,
    required,
)

POSITION_OFFSET = 2  # the first rows of the position table are never used
EPS = 1e-5

_LAYER = {
    "self_attn.q_proj": "attention.qkv:q",
    "self_attn.k_proj": "attention.qkv:k",
    "self_attn.v_proj": "attention.qkv:v",
    "self_attn.out_proj": "attention.out",
    "self_attn_layer_norm": "attention_norm",
    "final_layer_norm": "mlp_norm",
    "fc1": "up",
    "fc2": "down",
}
_STACK = {
    "embed_tokens": "embedding",
    "embed_positions": "positions",
    "final_layer_norm": "norm",
    "project_in": "project_in",
    "project_out": "project_out",
    **{f"layers.*.{name}": f"layers.*.{target}" for name, target in _LAYER.items()},
}
WEIGHTS = {
    "lm_head": "head.projection",
    **{f"{prefix}.{name}": target for prefix in ("model.decoder", "decoder") for name, target in _STACK.items()},
}


class OPTLayer(nn.Module):
    """x [T, H] → [T, H]."""

    def __init__(self, ctx: ModelContext, config: Mapping[str, Any], index: int) -> None:
        super().__init__()
        hidden, inner, heads = (required(config, name) for name in ("hidden_size", "ffn_dim", "num_attention_heads"))
        bias = config.get("enable_bias", True)
        shape = AttentionShape(hidden, heads, heads, hidden // heads, qkv_bias=bias, out_bias=bias)
        self.norm_first = config.get("do_layer_norm_before", True)
        self.attention_norm, self.mlp_norm = (LayerNorm(ctx, hidden, EPS) for _ in range(2))
        self.attention = Attention(ctx, f"layers.{index}.attention", shape, None)
        self.up = Linear(ctx, hidden, inner, bias=bias, shard="column")
        self.down = Linear(ctx, inner, hidden, bias=bias, shard="row")
        self._activation = ctx.ops.resolve(activation_op(config.get("activation_function", "relu")), dtype=ctx.dtype)

    def _mlp(self, x: Tensor) -> Tensor:
        return self.down(self._activation(self.up(x)))

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        if not self.norm_first:
            x, _ = self.attention_norm(self.attention(x, fwd), x)
            return self.mlp_norm(self._mlp(x), x)[0]
        y = self.attention(self.attention_norm(x)[0], fwd)
        y, x = self.mlp_norm(y, x)
        return x + self._mlp(y)


class OPT(nn.Module):
    """Implements `Model`."""

    def __init__(self, config: Mapping[str, Any], ctx: ModelContext) -> None:
        super().__init__()
        hidden, vocab, layers = (required(config, name) for name in ("hidden_size", "vocab_size", "num_hidden_layers"))
        width = config.get("word_embed_proj_dim") or hidden
        self.embedding = VocabEmbedding(ctx, vocab, width)
        self.positions = VocabEmbedding(ctx, required(config, "max_position_embeddings") + POSITION_OFFSET, hidden)
        self.project_in = Linear(ctx, width, hidden) if width != hidden else None
        self.project_out = Linear(ctx, hidden, width) if width != hidden else None
        self.layers = nn.ModuleList(OPTLayer(ctx, config, index) for index in range(layers))
        norm = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
        self.norm = LayerNorm(ctx, hidden, EPS) if norm else None
        tied = self.embedding if config.get("tie_word_embeddings", True) else None
        self.head = LogitsHead(ctx, vocab, width, tied)
        self.taps = Taps(layers, ctx.taps)
        self.tap_points = self.taps.points

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] → [T, H], without positions."""
        x = self.embedding(token_ids)
        return x if self.project_in is None else self.project_in(x)

    def forward(self, fwd: Forward) -> Tensor:
        """→ [T, width of the embedding] after the final norm."""
        x = self.embed(fwd.token_ids)
        if fwd.embeds is not None:
            x = torch.where(fwd.embeds_mask[:, None], fwd.embeds.to(x.dtype), x)
        x = x + self.positions(fwd.positions + POSITION_OFFSET)
        self.taps(fwd, "embedding", x)
        for index, layer in enumerate(self.layers):
            x = layer(x, fwd)
            self.taps(fwd, f"layers.{index}", x)
        x = x if self.norm is None else self.norm(x)[0]
        self.taps(fwd, "norm", x)
        return x if self.project_out is None else self.project_out(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)


def build(ctx: ModelContext) -> OPT:
    """Raises ConfigError for what is not supported."""
    config = ctx.info.config
    if not config.get("layer_norm_elementwise_affine", True):
        raise ConfigError("config.json turns layer_norm_elementwise_affine off, which is not supported")
    return OPT(config, ctx)
