"""The two heads. Slot i of their layers holds the pair (target state at i - 1, token i), at position i - 1.

A pass gives each pair an output, which `logits` reads for the token after it, and the state that the next pair takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from kernel_core.api import ConfigError, ModelFamily
from kernel_core.nn.api import Forward, Linear, ModelContext, RMSNorm, Rotary, Target, VocabEmbedding
from kernel_eagle.checkpoint import HeadConfig
from kernel_eagle.layers import Bias, DraftLogits, HeadLayer, IfStored, rotaries

_PARTS = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "self_attn.q_proj": "attention.qkv:q",
    "self_attn.k_proj": "attention.qkv:k",
    "self_attn.v_proj": "attention.qkv:v",
    "self_attn.o_proj": "attention.out",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "mlp.gate_proj": "mlp.gate_up:gate",
    "mlp.up_proj": "mlp.gate_up:up",
    "mlp.down_proj": "mlp.down",
}
_LAYERS: dict[str, str | None] = {f"layers.*.{name}": f"layers.*.{part}" for name, part in _PARTS.items()}
_LAYERS["layers.*.self_attn.rotary_emb.inv_freq"] = None
_EAGLE = _LAYERS | {name.replace("layers.*", "transformer"): part and part.replace("*", "0") for name, part in _LAYERS.items()}
_EAGLE |= {
    "fc": "fc",
    "fc.bias": "fc_bias:bias",
    "fusion_fc": "fc",
    "fusion_fc.bias": "fc_bias:bias",
    "enorm": "token_norm",
    "hnorm": "state_norm",
    "embed_tokens": None,  # the target's
    "lm_head": "logits.own",
    "token_map": "logits.tokens:token_map",
}
_EAGLE3 = (
    _LAYERS
    | {name.replace("layers.*", "midlayer"): part and part.replace("*", "0") for name, part in _LAYERS.items()}
    | {f"{layer}.hidden_norm": f"{path}.state_norm" for layer, path in (("layers.*", "layers.*"), ("midlayer", "layers.0"))}
    | {
        "fc": "fc",
        "input_norm": "input_norm",
        "fc_norm.*": "fc_norm.*",
        "norm": "norm",
        "embed_tokens": "embedding",
        "lm_head": "logits.own",
        "d2t": "logits.tokens:d2t",
        "t2d": None,  # says of each of the target's tokens whether d2t names it
    }
)
EAGLE_WEIGHTS, EAGLE3_WEIGHTS = (
    names | {name if name in ("d2t", "t2d", "token_map") else f"model.{name}": part for name, part in names.items()}
    for names in (_EAGLE, _EAGLE3)
)
FAMILIES = {
    "eagle": ModelFamily("eagle", "kernel_eagle.heads:build_eagle", "kernel_eagle.heads:EAGLE_WEIGHTS"),
    "eagle3": ModelFamily("eagle3", "kernel_eagle.heads:build_eagle3", "kernel_eagle.heads:EAGLE3_WEIGHTS"),
}


class Head(Protocol):
    """A head as the drafter uses it; an nn.Module."""

    def settle(self, target: Target) -> None:
        """Take from the target what the checkpoint left out. Rate: build, once the weights are loaded. Raises ConfigError."""
        ...

    def states(self, hidden: Tensor, taps: Mapping[str, Tensor]) -> Tensor:
        """What pairs take from the target: its final states [T, H] or those at the taps [T, H] → [T, H]. Rate: graph."""
        ...

    def __call__(self, fwd: Forward, states: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N] and the states before them [N, H] → outputs [N, H] for `logits`, states [N, H] after them. Rate: graph."""
        ...

    def logits(self, outputs: Tensor) -> Tensor:
        """[N, H] → [N, V] of the target's vocabulary, -inf where the head's has no such token. Rate: graph."""
        ...


class Eagle(nn.Module):
    """EAGLE-1: fc of [embedding of the token; state] through layers of which the first has no input norm. The output estimates
    the target's final state at the token: the target's own head reads it, and it is the next state."""

    def __init__(self, config: HeadConfig, ctx: ModelContext, length: int) -> None:
        super().__init__()
        layers, hidden = config.layers, config.layers.hidden_size
        self.fc = Linear(ctx, 2 * hidden, hidden)
        self.fc_bias = Bias(hidden, config.fc_bias, ctx.device, ctx.dtype)
        self.token_norm = RMSNorm(ctx, hidden, layers.norm_eps) if config.para_norm else None
        self.state_norm = RMSNorm(ctx, hidden, layers.norm_eps) if config.para_norm else None
        self.layers = nn.ModuleList(
            HeadLayer(ctx, layers, index, rotary, hidden, norm=index > 0)
            for index, rotary in enumerate(rotaries(ctx, layers, length))
        )
        truncated = config.draft_vocab < layers.vocab_size
        self.logits = DraftLogits(ctx, config, "token_map", rows=config.draft_vocab if truncated else 0)

    def settle(self, target: Target) -> None:
        self.embed = target.embed
        self.logits.borrow(target)

    def states(self, hidden: Tensor, taps: Mapping[str, Tensor]) -> Tensor:
        return hidden

    def forward(self, fwd: Forward, states: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.embed(fwd.token_ids)
        if self.token_norm is not None and self.state_norm is not None:
            tokens, states = self.token_norm(tokens)[0], self.state_norm(states)[0]
        x, residual = self.fc_bias(self.fc(torch.cat([tokens, states], -1))), None
        for layer in self.layers:
            x, residual = layer(x, residual, fwd)
        x = x + residual
        return x, x


class MixedLayer(HeadLayer):
    """The first layer of EAGLE-3: it attends by [norm of the token's embedding; norm of the state] and goes on with the state."""

    def __init__(self, ctx: ModelContext, config: HeadConfig, rotary: Rotary) -> None:
        layers = config.layers
        super().__init__(ctx, layers, 0, rotary, 2 * layers.hidden_size)
        self.state_norm = RMSNorm(ctx, layers.hidden_size, layers.norm_eps)
        self.norm_before_residual = config.norm_before_residual

    def mix(self, tokens: Tensor, states: Tensor, fwd: Forward) -> tuple[Tensor, Tensor]:
        normed = self.state_norm(states)[0]
        x = self.attention(torch.cat([self.attention_norm(tokens)[0], normed], -1), fwd)
        return self.attended(x, normed if self.norm_before_residual else states)


class Eagle3(nn.Module):
    """EAGLE-3: fc of several states of the target, a layer over them and the token's embedding, perhaps plain layers after it, a
    norm and a head over `draft_vocab` tokens. The next state is the output before that norm (`norm_output`: after it)."""

    def __init__(self, config: HeadConfig, ctx: ModelContext, length: int) -> None:
        super().__init__()
        layers, hidden, size = config.layers, config.layers.hidden_size, config.target_hidden
        self.config, eps, count = config, layers.norm_eps, len(config.aux)
        self.fc = Linear(ctx, count * size, hidden) if count else None
        self.input_norm = RMSNorm(ctx, count * size, eps) if config.norm_before_fc else None
        self.fc_norm = nn.ModuleList(RMSNorm(ctx, size, eps) for _ in config.aux if config.fc_norm)
        first, *others = rotaries(ctx, layers, length)
        plain = (HeadLayer(ctx, layers, index, rotary, hidden) for index, rotary in enumerate(others, 1))
        self.layers = nn.ModuleList([MixedLayer(ctx, config, first), *plain])
        self.norm = RMSNorm(ctx, hidden, eps)
        self.embedding = IfStored(VocabEmbedding(ctx, layers.vocab_size, hidden))
        self.logits = DraftLogits(ctx, config, "d2t")

    def settle(self, target: Target) -> None:
        own, config = self.embedding.layer, self.config
        same_size = config.layers.hidden_size == config.target_hidden
        if not same_size and (own is None or self.logits.own.layer is None):
            raise ConfigError(
                f"the head stores no {'embed_tokens' if own is None else 'lm_head'}, and the target's have another hidden size "
                f"({config.target_hidden} instead of {config.layers.hidden_size})"
            )
        if own is not None and same_size and same_rows(own, target.embed, config.layers.vocab_size):
            self.embedding.layer = None
        self.embed = self.embedding.layer or target.embed
        self.logits.borrow(target)

    def states(self, hidden: Tensor, taps: Mapping[str, Tensor]) -> Tensor:
        if self.fc is None:
            return hidden
        read = [taps[name] for name in self.config.taps]
        if self.fc_norm:
            read = [norm(state)[0] for norm, state in zip(self.fc_norm, read, strict=True)]
        x = torch.cat(read, -1)
        return self.fc(x if self.input_norm is None else self.input_norm(x)[0])

    def forward(self, fwd: Forward, states: Tensor) -> tuple[Tensor, Tensor]:
        first, *others = self.layers
        x, residual = first.mix(self.embed(fwd.token_ids), states, fwd)
        for layer in others:
            x, residual = layer(x, residual, fwd)
        outputs, before = self.norm(x, residual)
        return outputs, outputs if self.config.norm_output else before


def same_rows(own: VocabEmbedding, embed: Callable[[Tensor], Tensor], count: int) -> bool:
    """Is a stored embedding the target's own? Compared some rows at a time."""
    ids = torch.arange(count, device=own.device)
    return all(torch.equal(own(part), embed(part)) for part in ids.split(4096))


def build_eagle(ctx: ModelContext) -> Eagle:
    """Called by the kernel's loader; the drafter puts the `HeadConfig` into `ctx.info.config`."""
    return Eagle(ctx.info.config["head"], ctx, ctx.info.config["length"])


def build_eagle3(ctx: ModelContext) -> Eagle3:
    return Eagle3(ctx.info.config["head"], ctx, ctx.info.config["length"])
