"""The stages, built from the kernel's layers under the published tensor names `speculator.{emb,proj,ln,head}.{i}`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernel_core.api import ModelFamily
from kernel_core.nn.api import Linear, LogitsHead, ModelContext, RMSNorm, VocabEmbedding
from kernel_mlp_speculator.checkpoint import SpeculatorConfig, read_config

EPS = 1e-6
WEIGHTS = {
    "speculator.emb.*": "emb.*",
    "speculator.proj.*": "proj.*",
    "speculator.ln.*": "ln.*",
    "speculator.head.*": "head.*.projection",
}
FAMILY = ModelFamily("mlp_speculator", "kernel_mlp_speculator.module:build", "kernel_mlp_speculator.module:WEIGHTS")


class ShiftedNorm(RMSNorm):
    """RMSNorm with a bias."""

    def __init__(self, ctx: ModelContext, size: int) -> None:
        super().__init__(ctx, size, EPS)
        self.bias = nn.Parameter(torch.empty_like(self.weight), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, residual = super().forward(x, residual)
        return x + self.bias, residual


class Again(nn.Module):
    """The place of a stage's layer whose weights are tied to the ones of the stage before: some checkpoints store them again."""

    expected: frozenset[str] = frozenset()

    def load(self, part: str, tensor: Tensor) -> list[str]:
        return [part]

    def finish(self) -> None: ...


class TiedHead(nn.Module):
    """`Again`, where a head would be."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = Again()


class Stages(nn.Module):
    """Stage i takes the state [N, D] (at first the target's, then a stage's own) and the token [N] that was drawn from it."""

    def __init__(self, config: SpeculatorConfig, ctx: ModelContext) -> None:
        super().__init__()
        self.config = config
        size, vocab, stages = config.inner_dim, config.vocab_size, range(config.n_predict)
        own = 1 if config.tie_weights else config.n_predict  # layers with weights; the first projection is never shared
        self.emb = nn.ModuleList(VocabEmbedding(ctx, vocab, size) if i < own else Again() for i in stages)
        self.proj = nn.ModuleList(Linear(ctx, size if i else config.emb_dim, size) if i < own + 1 else Again() for i in stages)
        self.ln = nn.ModuleList(ShiftedNorm(ctx, size) if i < own else Again() for i in stages)
        self.head = nn.ModuleList(LogitsHead(ctx, vocab, size) if i < own else TiedHead() for i in stages)
        self.own = own
        self._gelu = ctx.ops.resolve("gelu", dtype=ctx.dtype, size=size)

    def first(self, hidden: Tensor) -> Tensor:
        """The target's final states [N, emb_dim] as the first stage takes them."""
        if not self.config.scale_input:
            return hidden
        x = hidden.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) / 2**0.5).to(hidden.dtype)

    def forward(self, number: int, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        """→ state [N, inner_dim], logits [N, V] of stage `number`."""
        tied = min(number, self.own - 1)
        x = self.proj[min(number, self.own)](state) + self.config.token_scale * self.emb[tied](token)
        state = self._gelu(self.ln[tied](x)[0])
        return state, self.head[tied](state)


def build(ctx: ModelContext) -> Stages:
    """Called by the kernel's loader."""
    return Stages(read_config(ctx.info), ctx)
