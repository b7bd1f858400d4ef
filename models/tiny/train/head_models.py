"""The three drafter heads in plain torch, under the tensor names of their published formats, and how far they look ahead.

A pair t is the target's state at position t with the token at t + 1; step k of its unroll drafts the token at t + 2 + k. Later
steps see the texts' own tokens: a draft counts only after right ones, and then they are the same. So one unroll serves
training (the training-time test of EAGLE-3, https://arxiv.org/abs/2503.01840) and measurement alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 3
AUX_LAYERS = (1, 2, 3)  # EAGLE-3 reads the inputs of these layers of the target


@dataclass
class Batch:
    """B texts padded at the right to T tokens: `ids` [B, T], `said` [B, T] what the target generated, `hidden` [B, T, H] its
    final states, `aux` [B, T, 3H] the inputs of AUX_LAYERS, `pairs` [B, Q] the pairs that draft, padded with the last one."""

    ids: Tensor
    said: Tensor
    hidden: Tensor
    aux: Tensor
    pairs: Tensor

    def token(self, step: int) -> Tensor:
        """[B, Q] the token `step` places after the state of each pair."""
        return self.ids.gather(1, self._place(step))

    def state(self, step: int) -> Tensor:
        """[B, Q, H] the target's final state `step` places after that of each pair."""
        return pick(self.hidden, self._place(step))

    def counts(self, step: int) -> Tensor:
        """[B, Q] bool: the pair drafts, and every token up to its draft `step` was generated in one go."""
        places = [self._place(1 + k) for k in range(step + 2)]
        fits = self.pairs + step + 2 < self.ids.shape[1]
        first = torch.ones_like(fits)
        first[:, 1:] = self.pairs[:, 1:] != self.pairs[:, :-1]
        return torch.stack([self.said.gather(1, place) for place in places]).all(0) & fits & first

    def _place(self, step: int) -> Tensor:
        return (self.pairs + step).clamp(max=self.ids.shape[1] - 1)


def pick(values: Tensor, places: Tensor) -> Tensor:
    """values [B, T, D], places [B, Q] → [B, Q, D]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[-1]))


@dataclass
class Draft:
    """One step of an unroll: `logits` [B, Q, V] of the draft, over the head's own vocabulary, `state` [B, Q, H] is fed back."""

    logits: Tensor
    state: Tensor


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Llama attention of the pairs, over all earlier pairs and, in later steps, over the drafts before."""

    def __init__(self, config: dict[str, Any], width: int) -> None:
        super().__init__()
        heads, self.kv_heads, self.dim = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        self.q_proj = nn.Linear(width, heads * self.dim, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, self.kv_heads * self.dim, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(heads * self.dim, config["hidden_size"], bias=False)
        self.register_buffer("rates", config["rope_theta"] ** (-torch.arange(0, self.dim, 2) / self.dim), persistent=False)

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """x [B, n, heads, D] at positions [B, n]."""
        angle = (position[..., None].float() * self.rates)[:, :, None]
        cos, sin = angle.cos(), angle.sin()
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    def entries(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, n, kv heads, D] of inputs [B, n, width] at positions [B, n]."""
        shape = (*x.shape[:2], self.kv_heads, self.dim)
        return self._rotate(self.k_proj(x).view(shape), position), self.v_proj(x).view(shape)

    def forward(
        self, x: Tensor, position: Tensor, base: tuple[Tensor, Tensor], pairs: Tensor, own: list[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """x [B, Q, width] at positions [B, Q]; sees entries 0 .. pairs of `base`, and its row's entry in each of `own`."""
        query = self._rotate(self.q_proj(x).unflatten(-1, (-1, self.dim)), position)
        query = query.unflatten(2, (self.kv_heads, -1)) * self.dim**-0.5  # [B, Q, kv heads, share, D]
        keys, values = base
        scores = torch.einsum("bqgsd,btgd->bgsqt", query, keys)
        seen = torch.arange(keys.shape[1], device=x.device) <= pairs[:, None, None, :, None]
        later = [torch.einsum("bqgsd,bqgd->bgsq", query, k)[..., None] for k, _ in own]
        weights = torch.cat([scores.masked_fill(~seen, float("-inf")), *later], -1).softmax(-1)
        out = torch.einsum("bgsqt,btgd->bqgsd", weights[..., : keys.shape[1]], values)
        for index, (_, v) in enumerate(own):
            out = out + weights[..., keys.shape[1] + index].permute(0, 3, 1, 2)[..., None] * v[:, :, :, None]
        return self.o_proj(out.flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """The rest of a Llama layer; what stands before attention differs between the two formats."""

    def __init__(self, config: dict[str, Any], width: int) -> None:
        super().__init__()
        hidden, eps = config["hidden_size"], config["rms_norm_eps"]
        self.self_attn = SelfAttention(config, width)
        self.mlp = MLP(hidden, config["intermediate_size"])
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        if width == 2 * hidden:
            self.input_layernorm, self.hidden_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        x = attended + residual
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle(nn.Module):
    """EAGLE-1 (https://arxiv.org/abs/2401.15077): fc([embedding of the token; state]) through one layer without input norm;
    the result is the next state itself, read by the target's head. `embedding` [V, H] is the target's, tied to its head."""

    def __init__(self, config: dict[str, Any], embedding: Tensor) -> None:
        super().__init__()
        hidden = config["hidden_size"]
        self.config = config
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList([Layer(config, hidden)])
        self.register_buffer("embedding", embedding, persistent=False)

    def _input(self, token: Tensor, state: Tensor) -> Tensor:
        return self.fc(torch.cat([F.embedding(token, self.embedding), state], -1))

    def unroll(self, batch: Batch, steps: int = STEPS) -> list[Draft]:
        (layer,) = self.layers
        whole = self._input(batch.ids[:, 1:], batch.hidden[:, :-1])
        base = layer.self_attn.entries(whole, torch.arange(whole.shape[1], device=whole.device).expand(len(whole), -1))
        x, own, drafts = pick(whole, batch.pairs), [], []
        for step in range(steps):
            position = batch.pairs + step
            if step:
                x = self._input(batch.token(step + 1), drafts[-1].state)
                own.append(layer.self_attn.entries(x, position))
            state = layer.finish(layer.self_attn(x, position, base, batch.pairs, own), x)
            drafts.append(Draft(F.linear(state, self.embedding), state))
        return drafts

    def target_ids(self) -> None:
        """The head's vocabulary is the target's."""


class Eagle3(nn.Module):
    """EAGLE-3: three states of the target through fc, one layer that attends by [norm of the token's embedding; norm of the
    state], a norm and a head over the `draft_vocab_size` most frequent tokens. Fed back is the state before that norm."""

    def __init__(self, config: dict[str, Any], embedding: Tensor, kept: Tensor | None = None) -> None:
        super().__init__()
        hidden, size = config["hidden_size"], config["draft_vocab_size"]
        kept = torch.zeros(size, dtype=torch.int64) if kept is None else kept
        self.config = config
        self.fc = nn.Linear(3 * hidden, hidden, bias=False)
        self.midlayer = Layer(config, 2 * hidden)
        self.norm = RMSNorm(hidden, config["rms_norm_eps"])
        self.lm_head = nn.Linear(hidden, size, bias=False)
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("d2t", kept - torch.arange(size))
        self.register_buffer("t2d", torch.zeros(config["vocab_size"], dtype=torch.bool).index_fill_(0, kept, True))

    def _input(self, token: Tensor, state: Tensor) -> Tensor:
        layer = self.midlayer
        return torch.cat([layer.input_layernorm(F.embedding(token, self.embedding)), layer.hidden_norm(state)], -1)

    def unroll(self, batch: Batch, steps: int = STEPS) -> list[Draft]:
        attention = self.midlayer.self_attn
        states = self.fc(batch.aux[:, :-1])
        whole = self._input(batch.ids[:, 1:], states)
        base = attention.entries(whole, torch.arange(whole.shape[1], device=whole.device).expand(len(whole), -1))
        x, state, own, drafts = pick(whole, batch.pairs), pick(states, batch.pairs), [], []
        for step in range(steps):
            position = batch.pairs + step
            if step:
                state = drafts[-1].state
                x = self._input(batch.token(step + 1), state)
                own.append(attention.entries(x, position))
            state = self.midlayer.finish(attention(x, position, base, batch.pairs, own), state)
            drafts.append(Draft(self.lm_head(self.norm(state)), state))
        return drafts

    def target_ids(self) -> Tensor:
        """[draft vocabulary] the target's id of each token of the head."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)


class SpeculatorNorm(nn.Module):
    """x / root mean square, then weight and bias where the format has them."""

    def __init__(self, size: int, scale_and_shift: bool = True) -> None:
        super().__init__()
        if scale_and_shift:
            self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * self.weight + self.bias if hasattr(self, "weight") else x


class Speculator(nn.Module):
    """The stages of an MLP speculator (https://arxiv.org/abs/2404.19124): state and token in, state and logits out."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        steps, emb, vocab, tied = (config[k] for k in ("n_predict", "emb_dim", "vocab_size", "tie_weights"))
        inner = config["inner_dim"] or emb
        number = 1 if tied else steps
        self.emb = nn.ModuleList(nn.Embedding(vocab, inner) for _ in range(number))
        self.proj = nn.ModuleList(nn.Linear(emb if not i else inner, inner, bias=False) for i in range(2 if tied else steps))
        self.head = nn.ModuleList(nn.Linear(inner, vocab, bias=False) for _ in range(number))
        self.ln = nn.ModuleList(SpeculatorNorm(inner) for _ in range(number))
        self.ln0 = SpeculatorNorm(emb, scale_and_shift=False)
        self.scale_input = config["scale_input"]
        state_weight = 0.5 ** (0.5 / steps)
        self.alpha = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight

    def first(self, hidden: Tensor) -> Tensor:
        return self.ln0(hidden) / 2**0.5 if self.scale_input else hidden

    def stage(self, step: int, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        emb, proj, head, ln = (modules[min(step, len(modules) - 1)] for modules in (self.emb, self.proj, self.head, self.ln))
        state = F.gelu(ln(proj(state) + self.alpha * emb(token)))
        return state, head(state)


class MLPSpeculator(nn.Module):
    def __init__(self, config: dict[str, Any], embedding: Tensor) -> None:
        super().__init__()
        self.config = config
        self.speculator = Speculator(config)

    def unroll(self, batch: Batch, steps: int = STEPS) -> list[Draft]:
        state, drafts = self.speculator.first(batch.state(0)), []
        for step in range(steps):
            state, logits = self.speculator.stage(step, state, batch.token(step + 1))
            drafts.append(Draft(logits, state))
        return drafts

    def target_ids(self) -> None:
        """The head's vocabulary is the target's."""


Head = Eagle | Eagle3 | MLPSpeculator


def head_of(config: dict[str, Any], embedding: Tensor) -> Head:
    """The untrained head that a config.json describes."""
    if config["model_type"] == "mlp_speculator":
        return MLPSpeculator(config, embedding)
    return (Eagle3 if "draft_vocab_size" in config else Eagle)(config, embedding)
