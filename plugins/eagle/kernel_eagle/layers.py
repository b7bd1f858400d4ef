"""What both kinds of heads are built from: attention over pairs (state i - 1, token i), and layers that a checkpoint may lack."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernel_core.api import ConfigError
from kernel_core.nn.api import (
    Attention,
    AttentionShape,
    DecoderConfig,
    Forward,
    GatedMLP,
    Linear,
    ModelContext,
    RMSNorm,
    Rotary,
    Target,
    UnknownPart,
)
from kernel_eagle.checkpoint import HeadConfig


class PairAttention(Attention):
    """Attention that reads inputs of another size than it writes; slot 0 holds no pair and is never read."""

    def __init__(self, ctx: ModelContext, config: DecoderConfig, index: int, rotary: Rotary, inputs: int) -> None:
        shape = AttentionShape(
            inputs,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            window=config.windows[index],
            qkv_bias=config.qkv_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        super().__init__(ctx, f"layers.{index}.attention", shape, rotary)
        self.out = Linear(ctx, config.num_heads * config.head_dim, config.hidden_size, bias=config.out_bias, shard="row")
        self.spec = replace(self.spec, first_slot=1)
        self.backend = ctx.attention(self.spec)


class HeadLayer(nn.Module):
    """x, residual [T, H] → x, residual, as a decoder layer. `inputs` is the size of what attention reads. `norm` False: the first
    layer of EAGLE-1, which normalises nothing before attention."""

    def __init__(
        self, ctx: ModelContext, config: DecoderConfig, index: int, rotary: Rotary, inputs: int, norm: bool = True
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(ctx, config.hidden_size, config.norm_eps) if norm else None
        self.attention = PairAttention(ctx, config, index, rotary, inputs)
        self.mlp_norm = RMSNorm(ctx, config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(ctx, config.hidden_size, config.intermediate_size, config.activation, config.mlp_bias)

    def forward(self, x: Tensor, residual: Tensor | None, fwd: Forward) -> tuple[Tensor, Tensor]:
        if self.attention_norm is not None:
            x, residual = self.attention_norm(x, residual)
        elif residual is None:
            residual = x
        return self.attended(self.attention(x, fwd), residual)

    def attended(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual = self.mlp_norm(x, residual)
        return self.mlp(x), residual


def rotaries(ctx: ModelContext, config: DecoderConfig, length: int) -> list[Rotary]:
    """One per layer, shared where they are the same; they reach `length` positions, whatever the head's config says."""
    made = {rope: Rotary(ctx, rope, config.head_dim) for rope in config.ropes if rope is not None}
    for rotary in made.values():
        rotary.length = max(rotary.length, length)
    return [made[rope] for rope in config.ropes if rope is not None]


class IfStored(nn.Module):
    """A layer that the checkpoint may leave out: `layer` when it was stored, else None. With `rows`, a tensor of another number
    of rows counts as left out."""

    expected: frozenset[str] = frozenset()

    def __init__(self, layer: nn.Module, rows: int | None = None) -> None:
        super().__init__()
        self._waiting, self._rows = (layer,), rows  # in a tuple: not a module that the loader waits for
        self.layer: nn.Module | None = None

    def load(self, part: str, tensor: Tensor) -> list[str]:
        if self._rows in (None, len(tensor)):
            (layer,) = self._waiting
            layer.load(part, tensor)
            self.layer = layer
        return [part]

    def finish(self) -> None:
        if self.layer is not None:
            self.layer.finish()

    def randomise(self, generator: torch.Generator) -> None:
        """Nothing is stored, so nothing is random."""


class Bias(nn.Module):
    """Adds a stored bias [size]; `required` False: only where there is one."""

    def __init__(self, size: int, required: bool, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.expected = frozenset({"bias"} if required else ())
        self._size, self._device, self._dtype = size, device, dtype
        self.bias: Tensor | None = None

    def load(self, part: str, tensor: Tensor) -> list[str]:
        if tensor.shape != (self._size,):
            raise ConfigError(f"it has the shape {tuple(tensor.shape)}, the model needs ({self._size},)")
        self.bias = tensor.to(self._device, self._dtype)
        return [part]

    def finish(self) -> None: ...
    def randomise(self, generator: torch.Generator) -> None:
        """Random heads have none."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.bias is None else x + self.bias


class DraftTokens(nn.Module):
    """Which of the target's tokens the head's own, smaller vocabulary has: `ids` int64, None: all. Stored as `d2t`, the distance
    of each id from its number, or as `token_map`, the ids."""

    def __init__(self, name: str, draft_vocab: int, vocab_size: int, device: torch.device) -> None:
        super().__init__()
        self.smaller = draft_vocab < vocab_size
        self.expected = frozenset({name} if self.smaller else ())
        self._size, self._vocab_size, self._device = draft_vocab, vocab_size, device
        self.ids: Tensor | None = None

    def load(self, part: str, tensor: Tensor) -> list[str]:
        if part not in ("d2t", "token_map"):
            raise UnknownPart(part)
        if not self.smaller:
            return [part]
        if tensor.shape != (self._size,):
            raise ConfigError(f"it has the shape {tuple(tensor.shape)}, the head's vocabulary {self._size} tokens")
        ids = tensor.to(self._device, torch.int64)
        ids = ids + torch.arange(self._size, device=self._device) if part == "d2t" else ids
        if ids.min() < 0 or ids.max() >= self._vocab_size or len(ids.unique()) != self._size:
            raise ConfigError(f"it does not name {self._size} different tokens of the target's {self._vocab_size}")
        self.ids = ids
        return [part]

    def finish(self) -> None: ...
    def randomise(self, generator: torch.Generator) -> None:
        if self.smaller:
            self.ids = torch.arange(self._size, device=self._device)

    def spread(self, logits: Tensor) -> Tensor:
        """Logits of the head's tokens [N, D], or of all [N, V] → [N, V], -inf for tokens that the head does not know."""
        if self.ids is None:
            return logits
        known = logits if logits.shape[1] == self._size else logits[:, self.ids]
        return logits.new_full((len(logits), self._vocab_size), float("-inf")).index_copy_(1, self.ids, known)


class DraftLogits(nn.Module):
    """Outputs [N, H] → logits [N, V] of the target's vocabulary. `own` is the head's own projection, else `target` is set: the
    target's. `rows`: see `IfStored`."""

    def __init__(self, ctx: ModelContext, config: HeadConfig, map_name: str, rows: int | None = None) -> None:
        super().__init__()
        self.own = IfStored(Linear(ctx, config.layers.hidden_size, config.draft_vocab), rows)
        self.tokens = DraftTokens(map_name, config.draft_vocab, config.layers.vocab_size, ctx.device)
        self.target: Callable[[Tensor], Tensor] | None = None
        self.scale = config.logit_scale

    def borrow(self, target: Target) -> None:
        """Rate: build."""
        self.target = None if self.own.layer is not None else target.logits

    def forward(self, outputs: Tensor) -> Tensor:
        logits = self.own.layer(outputs) if self.target is None else self.target(outputs)
        return self.tokens.spread(logits if self.scale == 1 else logits * self.scale)
