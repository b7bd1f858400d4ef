"""One decoder for the models that differ only in numbers and switches: `DecoderConfig` states them, `Decoder` is the module.

A family is data: `read_decoder(config.json, its own settings)` and its name map, usually `DECODER_WEIGHTS` and a few entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kernel_core.errors import ConfigError
from kernel_core.nn.layers import Attention, AttentionShape, GatedMLP, LogitsHead, RMSNorm, VocabEmbedding, gated_op
from kernel_core.nn.moe import MoE, MoEShape
from kernel_core.nn.protocols import Forward, ModelContext
from kernel_core.nn.rope import RopeConfig, Rotary, read_rope


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Everything that makes one decoder. `ropes` and `windows` have an entry per layer (None: no rotation, no window).

    `norm_offset`: see `RMSNorm`. `sandwich`: the outputs of attention and MLP are normalised too. `scale` None:
    1 / sqrt(head_dim). `soft_cap` is on attention scores, `logit_cap` on logits. `moe` takes the place of the MLP in
    `moe_layers`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ropes: tuple[RopeConfig | None, ...]
    windows: tuple[int | None, ...]
    activation: str = "silu"
    norm_eps: float = 1e-6
    norm_offset: int = 0
    sandwich: bool = False
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    scale: float | None = None
    soft_cap: float | None = None
    logit_cap: float | None = None
    embedding_scale: float | None = None
    tied: bool = False
    moe: MoEShape | None = None
    moe_layers: frozenset[int] = frozenset()


def required(config: Mapping[str, Any], name: str) -> Any:
    """A value that config.json must state. Raises ConfigError."""
    if config.get(name) is None:
        raise ConfigError(f"config.json does not state {name!r}, which this architecture needs")
    return config[name]


def read_decoder(config: Mapping[str, Any], **settings: Any) -> DecoderConfig:
    """The numbers under their usual names in config.json; `settings` are `DecoderConfig` fields that a family knows
    otherwise, and win. Raises ConfigError for what is missing or not supported."""
    layers, heads = int(required(config, "num_hidden_layers")), int(required(config, "num_attention_heads"))
    hidden = int(required(config, "hidden_size"))
    head_dim = settings.get("head_dim") or config.get("head_dim") or hidden // heads
    read = {
        "vocab_size": int(required(config, "vocab_size")),
        "hidden_size": hidden,
        "intermediate_size": int(required(config, "intermediate_size")),
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "windows": (None,) * layers,
        "activation": config.get("hidden_act", "silu"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "tied": bool(config.get("tie_word_embeddings", False)),
        **settings,
    }
    if "ropes" not in read:
        read["ropes"] = (read_rope(config, head_dim),) * layers
    gated_op(read["activation"])
    return DecoderConfig(**read)


def layer_types(config: Mapping[str, Any], default: Sequence[str]) -> Sequence[str]:
    """ "full_attention" or "sliding_attention" of every layer. Raises ConfigError for any other type."""
    types = config.get("layer_types") or default
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        raise ConfigError(f"config.json has layers of the types {unknown}; supported are full_attention and sliding_attention")
    return types


def layer_windows(config: Mapping[str, Any], types: Sequence[str]) -> tuple[int | None, ...]:
    """The window of every layer. A sliding layer without a stated window sees everything."""
    return tuple(config.get("sliding_window") if kind == "sliding_attention" else None for kind in types)


class DecoderLayer(nn.Module):
    """x, residual [T, H] → x, residual; their sum is the hidden state after the layer."""

    def __init__(self, ctx: ModelContext, config: DecoderConfig, index: int, rotary: Rotary | None) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.attention_norm, self.mlp_norm = _norm(ctx, config), _norm(ctx, config)
        self.attention = Attention(ctx, f"layers.{index}.attention", _attention_shape(config, index), rotary)
        if config.moe is not None and index in config.moe_layers:
            self.mlp = MoE(ctx, hidden, config.moe, config.activation)
        else:
            self.mlp = GatedMLP(ctx, hidden, config.intermediate_size, config.activation, config.mlp_bias)
        self.attention_post_norm = self.mlp_post_norm = None
        if config.sandwich:
            self.attention_post_norm, self.mlp_post_norm = _norm(ctx, config), _norm(ctx, config)

    def forward(self, x: Tensor, residual: Tensor | None, fwd: Forward, read: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`read` [N]: after the attention only these tokens go on."""
        x, residual = self.attention_norm(x, residual)
        x = self.attention(x, fwd)
        if read is not None:
            x, residual = x[read], residual[read]
        if self.attention_post_norm is not None:
            x, _ = self.attention_post_norm(x)
        x, residual = self.mlp_norm(x, residual)
        x = self.mlp(x)
        if self.mlp_post_norm is not None:
            x, _ = self.mlp_post_norm(x)
        return x, residual


def _norm(ctx: ModelContext, config: DecoderConfig) -> RMSNorm:
    return RMSNorm(ctx, config.hidden_size, config.norm_eps, config.norm_offset)


def _attention_shape(config: DecoderConfig, index: int) -> AttentionShape:
    return AttentionShape(
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        scale=config.scale,
        window=config.windows[index],
        soft_cap=config.soft_cap,
        qkv_bias=config.qkv_bias,
        out_bias=config.out_bias,
        qk_norm_eps=config.norm_eps if config.qk_norm else None,
        qk_norm_offset=config.norm_offset,
    )


class Taps:
    """The tap points of a stack of layers: "embedding", "layers.N" (the hidden state after layer N) and "norm"."""

    def __init__(self, num_layers: int, names: Sequence[str]) -> None:
        self.points = {"embedding": "the input of the first layer", "norm": "after the final norm"} | {
            f"layers.{index}": f"the hidden state after layer {index}" for index in range(num_layers)
        }
        self.select(names)

    def select(self, names: Sequence[str]) -> None:
        """Which points are filled from now on. Rate: build. Raises ConfigError for an unknown one."""
        unknown = sorted(set(names) - set(self.points))
        if unknown:
            raise ConfigError(f"the model has no tap points {unknown}; there are {sorted(self.points)}")
        self._names = frozenset(names)

    def __call__(self, fwd: Forward, name: str, x: Tensor, residual: Tensor | None = None) -> None:
        """The model passes a point. Rate: graph."""
        if fwd.tapped and name in self._names:
            fwd.taps[name] = x if residual is None else x + residual


class Decoder(nn.Module):
    """Implements `Model`; its tap points are those of `Taps`."""

    def __init__(self, config: DecoderConfig, ctx: ModelContext) -> None:
        super().__init__()
        self.config = config
        # as the checkpoint's dtype rounds it
        scale = config.embedding_scale
        self.embedding_scale = None if scale is None else float(torch.tensor(scale, dtype=ctx.dtype))
        self.embedding = VocabEmbedding(ctx, config.vocab_size, config.hidden_size)
        rotaries = {rope: Rotary(ctx, rope, config.head_dim) for rope in config.ropes if rope is not None}
        self.layers = nn.ModuleList(
            DecoderLayer(ctx, config, index, rotaries.get(rope)) for index, rope in enumerate(config.ropes)
        )
        self.norm = _norm(ctx, config)
        self.head = LogitsHead(
            ctx, config.vocab_size, config.hidden_size, self.embedding if config.tied else None, config.logit_cap
        )
        self.taps = Taps(config.num_layers, ctx.taps)
        self.tap_points = self.taps.points

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] → [T, H], scaled as the model does."""
        x = self.embedding(token_ids)
        return x if self.embedding_scale is None else x * self.embedding_scale

    def forward(self, fwd: Forward) -> Tensor:
        """→ hidden states after the final norm, [T, H], or [N, H] of `fwd.read`."""
        x, residual = self.embed(fwd.token_ids), None
        if fwd.embeds is not None:
            x = torch.where(fwd.embeds_mask[:, None], fwd.embeds.to(x.dtype), x)
        self.taps(fwd, "embedding", x)
        for index, layer in enumerate(self.layers):
            x, residual = layer(x, residual, fwd, fwd.read if index + 1 == len(self.layers) else None)
            self.taps(fwd, f"layers.{index}", x, residual)
        x, _ = self.norm(x, residual)
        self.taps(fwd, "norm", x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] → [N, V], in the model's dtype."""
        return self.head(hidden)


_LAYER = "model.layers.*"

#: checkpoint name → module and part, as most decoders are stored; see `kernel_core.nn.loading.NameMap`
DECODER_WEIGHTS: Mapping[str, str | None] = {
    "model.embed_tokens": "embedding",
    "model.norm": "norm",
    "lm_head": "head.projection",
    f"{_LAYER}.input_layernorm": "layers.*.attention_norm",
    f"{_LAYER}.post_attention_layernorm": "layers.*.mlp_norm",
    f"{_LAYER}.self_attn.q_proj": "layers.*.attention.qkv:q",
    f"{_LAYER}.self_attn.k_proj": "layers.*.attention.qkv:k",
    f"{_LAYER}.self_attn.v_proj": "layers.*.attention.qkv:v",
    f"{_LAYER}.self_attn.o_proj": "layers.*.attention.out",
    f"{_LAYER}.self_attn.q_norm": "layers.*.attention.q_norm",
    f"{_LAYER}.self_attn.k_norm": "layers.*.attention.k_norm",
    f"{_LAYER}.mlp.gate_proj": "layers.*.mlp.gate_up:gate",
    f"{_LAYER}.mlp.up_proj": "layers.*.mlp.gate_up:up",
    f"{_LAYER}.mlp.down_proj": "layers.*.mlp.down",
    f"{_LAYER}.self_attn.rotary_emb.inv_freq": None,
    "model.rotary_emb.inv_freq": None,
}
