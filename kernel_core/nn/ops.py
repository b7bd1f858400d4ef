"""Semantic ops: what models are written against, a torch reference of each, and the choice among what devices registered.

An op is resolved once per call site, at build, from the site's static facts (dtype, sizes, weight format). Letters: T tokens,
H hidden size, F intermediate size, E experts, V vocabulary. Signatures, for references and devices alike:

    embedding(ids [T] int64, weight [V, H]) → [T, H]
    linear(x [T, K], state) → [T, N]    facts: format, dtype, in_features, out_features, bias, tied
    rms_norm(x [T, H], weight [H], eps, residual or None, offset) → (normalised, x + residual)    facts: dtype, size, offset
    layer_norm(x, weight or None, bias or None, eps, residual or None) → (normalised, x + residual)    facts: dtype, size
    rotary(q [T, Hq, D], k [T, Hk, D], cos [P, rot / 2], sin, positions [T] int64) → (q, k)
                                                                      facts: dtype, head_dim, interleaved
    silu_mul(x [T, 2F]), gelu_mul(x), gelu_tanh_mul(x) → [T, F]: activation of the first half times the second half
    relu(x), silu(x), gelu(x), gelu_tanh(x) → the shape of x
    soft_cap(x, cap) → tanh(x / cap) * cap
    moe(x [T, H], logits [T, E], state, top_k, renormalise) → [T, H]    facts: dtype, num_experts, activation, format
    all_reduce(x), all_gather(x): over the ranks; the references are for one rank    facts: world_size

`rotary` may write into q and k; they may be views with any token and head strides. The residual forms add before they
normalise. `linear` and `moe` are called with a state: see `PreparedOp`.

Reductions of the references: `linear` and `moe` reduce in torch's matmul, whose order may depend on the number of rows, so
a row's last bits can depend on the batch; norms, softmax and activations reduce within a row and do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_core.errors import PluginError

REFERENCE = "reference"


class PreparedOp(Protocol):
    """An op with weights (`linear`, `moe`) may be an object that lays its weights out once, at build.

    `prepare` gets the plain weights ([N, K] and a bias or None; for `moe` gate_up [E, 2F, H] and down [E, H, F]) and returns
    the state that the calls are given. A plain function has no `prepare`: its state is the tuple of the weights. With
    `keeps_weight` False the layer lets go of the plain weight afterwards. An embedding that is tied to such a linear reads
    its rows by `rows(state, ids [T]) → [T, K]`; without that method the plain weight is kept beside the state."""

    keeps_weight: bool

    def prepare(self, *weights: Tensor | None) -> Any: ...
    def __call__(self, x: Tensor, *arguments: Any) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Offer:
    """One implementation. `predicate` None: fits every call site."""

    owner: str
    priority: int
    function: Callable[..., Any]
    predicate: Callable[[Mapping[str, Any]], bool] | None = None


class Ops:
    """Implements `OpRegistry`. References have priority -1, so that whatever a device registers comes before them; among
    equals the first registered is taken."""

    def __init__(self) -> None:
        self._offers: dict[str, list[Offer]] = {}
        self._chosen: dict[tuple[str, tuple[tuple[str, Any], ...]], Offer] = {}
        for name, function, facts in REFERENCES:
            self.register(name, function, owner=REFERENCE, priority=-1, predicate=_has(facts) if facts else None)

    def register(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        owner: str,
        priority: int = 0,
        predicate: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> None:
        """Offer an implementation. Rate: build, before the model is built."""
        offers = self._offers.setdefault(name, [])
        offers.append(Offer(owner, priority, function, predicate))
        offers.sort(key=lambda offer: -offer.priority)
        self._chosen = {key: offer for key, offer in self._chosen.items() if key[0] != name}

    def resolve(self, name: str, **facts: Any) -> Callable[..., Any]:
        """The implementation for a call site. Rate: build. Raises PluginError when none fits."""
        key = (name, tuple(sorted(facts.items())))
        if key not in self._chosen:
            self._chosen[key] = self._choose(name, facts)
        return self._chosen[key].function

    def _choose(self, name: str, facts: Mapping[str, Any]) -> Offer:
        offers = self._offers.get(name, [])
        for offer in offers:
            if offer.predicate is None or offer.predicate(facts):
                return offer
        tried = ", ".join(offer.owner for offer in offers) or "nobody"
        raise PluginError(f"no implementation of the op {name!r} fits {_listing(facts)} (offered by {tried})")

    def explain(self) -> Sequence[tuple[str, str, str]]:
        """(op, owner, facts) of every choice made so far."""
        return [(name, offer.owner, _listing(dict(facts))) for (name, facts), offer in self._chosen.items()]


def prepare(op: Callable[..., Any], *weights: Tensor | None) -> Any:
    """The state that a weighted op is called with."""
    make = getattr(op, "prepare", None)
    return weights if make is None else make(*weights)


def keeps_weight(op: Callable[..., Any]) -> bool:
    """Whether the plain weight must stay alive after `prepare`."""
    return getattr(op, "keeps_weight", True)


def _has(facts: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], bool]:
    return lambda site: all(site.get(name) == value for name, value in facts.items())


def _listing(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in sorted(facts.items())) or "no facts"


# ---- references --------------------------------------------------------------------------------------------------


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(ids, weight)


def linear(x: Tensor, state: tuple[Tensor, Tensor | None]) -> Tensor:
    return F.linear(x, *state)


class Int8Linear:
    """Weight-only int8, one symmetric scale per output channel: weight ≈ scale[:, None] * q, q in [-127, 127]. Made from
    the plain weight. Products and sums in float32, rounded once to x's dtype."""

    keeps_weight = False

    def prepare(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = weight.float().abs().amax(1) / 127
        steps = weight.float() / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        return steps.round_().to(torch.int8), scale, bias

    def __call__(self, x: Tensor, state: tuple[Tensor, Tensor, Tensor | None]) -> Tensor:
        quantised, scale, bias = state
        y = F.linear(x.float(), quantised.float()) * scale
        return (y if bias is None else y + bias.float()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, offset: int = 0) -> tuple[Tensor, Tensor]:
    """In float32. Offset 0: rounded to x's dtype, then times weight; offset 1: times 1 + weight in float32, rounded once."""
    total = x if residual is None else x + residual
    wide = total.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((y * (weight.float() + offset)).to(x.dtype) if offset else y.to(x.dtype) * weight), total


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    return F.layer_norm(total, total.shape[-1:], weight, bias, eps), total


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Turns the pairs (i, i + rot / 2) of each head's first `rot` elements, in float32; the other elements stay."""
    half, cos, sin = cos.shape[1], cos[positions][:, None], sin[positions][:, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., :half].float(), x[..., half : 2 * half].float()
        return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), x[..., 2 * half :]], -1)

    return turn(q), turn(k)


def rotary_interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """As `rotary`, of the pairs (2i, 2i + 1)."""
    rot, cos, sin = 2 * cos.shape[1], cos[positions][:, None], sin[positions][:, None]

    def turn(x: Tensor) -> Tensor:
        a, b = x[..., :rot:2].float(), x[..., 1:rot:2].float()
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
        return torch.cat([turned.to(x.dtype), x[..., rot:]], -1)

    return turn(q), turn(k)


def gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def gated(activation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def act_mul(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return activation(gate) * up

    return act_mul


def soft_cap(x: Tensor, cap: float) -> Tensor:
    return torch.tanh(x / cap) * cap


def route(logits: Tensor, top_k: int, renormalise: bool) -> tuple[Tensor, Tensor]:
    """Router logits [T, E] → weights float32 and experts int64, both [T, top_k]: softmax over all experts, then the best."""
    weights, experts = logits.float().softmax(-1).topk(top_k, -1)
    return (weights / weights.sum(-1, keepdim=True) if renormalise else weights), experts


class MoE:
    """Tokens grouped by expert, one pair of matmuls per expert that is used; results are added in order of experts."""

    keeps_weight = True

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        self.act_mul = gated(activation)

    def prepare(self, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        return gate_up, down

    def __call__(self, x: Tensor, logits: Tensor, state: tuple[Tensor, Tensor], top_k: int, renormalise: bool) -> Tensor:
        gate_up, down = state
        weights, experts = route(logits, top_k, renormalise)
        out = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            token, rank = (experts == expert).nonzero(as_tuple=True)
            y = F.linear(self.act_mul(F.linear(x[token], gate_up[expert])), down[expert])
            out.index_add_(0, token, (y * weights[token, rank, None]).to(x.dtype))
        return out


def one_rank(x: Tensor) -> Tensor:
    return x


REFERENCES: tuple[tuple[str, Callable[..., Any], Mapping[str, Any]], ...] = (
    ("embedding", embedding, {}),
    ("linear", linear, {"format": "plain"}),
    ("linear", Int8Linear(), {"format": "int8"}),
    ("rms_norm", rms_norm, {}),
    ("layer_norm", layer_norm, {}),
    ("rotary", rotary, {"interleaved": False}),
    ("rotary", rotary_interleaved, {"interleaved": True}),
    ("silu_mul", gated(F.silu), {}),
    ("gelu_mul", gated(F.gelu), {}),
    ("gelu_tanh_mul", gated(gelu_tanh), {}),
    ("relu", F.relu, {}),
    ("silu", F.silu, {}),
    ("gelu", F.gelu, {}),
    ("gelu_tanh", gelu_tanh, {}),
    ("soft_cap", soft_cap, {}),
    ("moe", MoE(F.silu), {"activation": "silu", "format": "plain"}),
    ("moe", MoE(F.gelu), {"activation": "gelu", "format": "plain"}),
    ("moe", MoE(gelu_tanh), {"activation": "gelu_tanh", "format": "plain"}),
    ("all_reduce", one_rank, {"world_size": 1}),
    ("all_gather", one_rank, {"world_size": 1}),
)
