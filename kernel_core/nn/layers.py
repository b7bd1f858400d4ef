"""Parallel layers. Each knows the checkpoint tensors it is made of (`parts`), how ranks share it (`shard`), how to take a
tensor in (`load`), and how to get ready once all are there (`finish`).

A part is named by what comes after the module's path: "weight", or "q.weight" in a layer fused from several tensors; a
checkpoint that stores them fused itself names them together: "q+k+v.weight". Parameters start on the meta device. A whole
tensor of the right dtype and device is taken as it is, so a memory-mapped checkpoint is not copied; anything else is copied
into place. `load` may be called again at any time (a live update), then `finish` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kernel_core.errors import ConfigError
from kernel_core.nn.ops import keeps_weight, prepare
from kernel_core.nn.protocols import AttentionSpec, Forward, HeadPreparation, ModelContext
from kernel_core.nn.rope import Rotary

Shard = Literal["column", "row", "none"]

#: activation names of config.json → ops
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
}


class UnknownPart(LookupError):
    """A layer was given a tensor that it has no place for."""


@dataclass(frozen=True, slots=True)
class Output:
    """What one checkpoint tensor adds to a linear's output: `size` rows that are shared between ranks in `units` (heads)."""

    size: int
    units: int


@dataclass(frozen=True, slots=True)
class Part:
    """Where one checkpoint tensor goes: its rows `source` of `size` are the rows `target` of this rank's weight."""

    size: int
    source: slice
    target: slice


def activation_op(name: str) -> str:
    """The op of an activation named in config.json. Raises ConfigError for one that is not supported."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"config.json asks for the activation {name!r}; supported are {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def gated_op(name: str) -> str:
    """The op that applies an activation to one half and multiplies by the other. Raises ConfigError."""
    op = activation_op(name)
    if op == "relu":
        raise ConfigError(f"config.json asks for a gated {name!r}, which is not supported")
    return op + "_mul"


def shard_units(units: int, rank: int, world_size: int) -> tuple[int, int]:
    """[start, stop) of a rank among `units` equal pieces. With fewer units than ranks, neighbouring ranks hold the same one.
    Raises ConfigError when they do not divide."""
    if units % world_size == 0:
        each = units // world_size
        return rank * each, (rank + 1) * each
    if world_size % units == 0:
        start = rank // (world_size // units)
        return start, start + 1
    raise ConfigError(f"{units} heads or channels cannot be shared between {world_size} ranks")


def make_parts(outputs: Mapping[str, Output], shard: Shard, rank: int, world_size: int) -> dict[str, Part]:
    """Lay the outputs of a fused linear one after the other, each cut for this rank where the shard is "column"."""
    parts, begin = {}, 0
    for name, output in outputs.items():
        first, last = shard_units(output.units, rank, world_size) if shard == "column" else (0, output.units)
        rows = output.size // output.units
        source = slice(first * rows, last * rows)
        parts[name] = Part(output.size, source, slice(begin, begin + source.stop - source.start))
        begin = parts[name].target.stop
    return parts


def empty(ctx: ModelContext, *shape: int) -> nn.Parameter:
    """A parameter without memory yet."""
    return nn.Parameter(torch.empty(*shape, dtype=ctx.dtype, device="meta"), requires_grad=False)


def put(module: nn.Module, name: str, tensor: Tensor, target: tuple[slice, ...], device: torch.device) -> None:
    """Put a tensor into a parameter, at `target`. A parameter without memory becomes the tensor itself where it covers all."""
    parameter = getattr(module, name)
    place = parameter[target]
    if place.shape != tensor.shape:
        raise ConfigError(f"it has the shape {tuple(tensor.shape)}, the model needs {tuple(place.shape)}")
    if parameter.is_meta and place.shape == parameter.shape:
        whole = tensor.detach().to(device, parameter.dtype).contiguous()
        setattr(module, name, nn.Parameter(whole, requires_grad=False))
        return
    if parameter.is_meta:
        parameter = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device=device), requires_grad=False)
        setattr(module, name, parameter)
    parameter.data[target].copy_(tensor)


def release(module: nn.Module, name: str) -> None:
    """Give a parameter's memory back; its shape stays known."""
    parameter = getattr(module, name)
    setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False))


def _split(part: str) -> tuple[list[str], str]:
    """ "q+k.weight" → (["q", "k"], "weight"); "weight" → ([""], "weight")."""
    names, _, kind = part.rpartition(".")
    return names.split("+"), kind


def _join(name: str, kind: str) -> str:
    return f"{name}.{kind}" if name else kind


class Linear(nn.Module):
    """x [T, in] → [T, out], of one or several checkpoint tensors. `format` is how the weight is kept: "plain", or another
    that an implementation of the op `linear` makes from the plain weight; a weight format may set it before loading.

    shard "column": outputs are shared between the ranks; "row": inputs are, and the result is summed over the ranks."""

    def __init__(
        self,
        ctx: ModelContext,
        in_features: int,
        outputs: Mapping[str, Output] | int,
        *,
        bias: bool = False,
        shard: Shard = "none",
    ) -> None:
        super().__init__()
        outputs = {"": Output(outputs, outputs)} if isinstance(outputs, int) else outputs
        self.shard, self.format, self.device, self._ops = shard, "plain", ctx.device, ctx.ops
        self.parts = make_parts(outputs, shard, ctx.rank, ctx.world_size)
        first, last = shard_units(in_features, ctx.rank, ctx.world_size) if shard == "row" else (0, in_features)
        self.columns = slice(first, last)
        self.in_features, self.out_features = last - first, max(part.target.stop for part in self.parts.values())
        self.weight = empty(ctx, self.out_features, self.in_features)
        # a bias that every rank added would be summed
        self.bias = empty(ctx, self.out_features) if bias and (shard != "row" or ctx.rank == 0) else None
        self._has_bias = bias
        self._reduce = ctx.ops.resolve("all_reduce", world_size=ctx.world_size) if ctx.world_size > 1 and shard == "row" else None
        self._op: Callable[..., Tensor] | None = None
        self._state: Any = None

    @property
    def expected(self) -> frozenset[str]:
        kinds = ("weight", "bias") if self._has_bias else ("weight",)
        return frozenset(_join(name, kind) for name in self.parts for kind in kinds)

    def load(self, part: str, tensor: Tensor) -> list[str]:
        """Take in a checkpoint tensor; the names of the parts it filled. Raises UnknownPart, ConfigError for its shape."""
        names, kind = _split(part)
        filled = [_join(name, kind) for name in names]
        if not self.expected.issuperset(filled):
            raise UnknownPart(part)
        if kind == "bias" and self.bias is None:
            return filled
        parts = [self.parts[name] for name in names]
        pieces = tensor.split([p.size for p in parts]) if sum(p.size for p in parts) == len(tensor) else ()
        if not pieces:
            raise ConfigError(f"it has the shape {tuple(tensor.shape)}, the model needs {sum(p.size for p in parts)} rows")
        if len(parts) == len(self.parts) and all(p.source == slice(0, p.size) for p in parts):
            pieces, parts = (tensor,), [Part(len(tensor), slice(0, len(tensor)), slice(0, len(tensor)))]
        for piece, place in zip(pieces, parts):
            piece = piece[place.source]
            put(self, kind, piece[:, self.columns] if kind == "weight" else piece, (place.target,), self.device)
        return filled

    def finish(self) -> None:
        """Choose the implementation and let it lay out the weight."""
        self._op = self._ops.resolve(
            "linear",
            format=self.format,
            dtype=self.weight.dtype,
            in_features=self.in_features,
            out_features=self.out_features,
            bias=self.bias is not None,
            tied=False,
        )
        self._state = prepare(self._op, self.weight, self.bias)
        if not keeps_weight(self._op):
            release(self, "weight")

    def forward(self, x: Tensor) -> Tensor:
        y = self._op(x, self._state)
        return y if self._reduce is None else self._reduce(y)

    def gated(self, x: Tensor, activation: str) -> Tensor | None:
        """activation(gate) * up [T, F] of a linear that holds both, where its op does that in one pass; None: it does not."""
        fused = getattr(self._op, "gated", None)
        return None if fused is None else fused(x, self._state, activation)


class VocabEmbedding(nn.Module):
    """Token ids [T] → [T, H]. Ranks share the vocabulary, padded to a multiple of them."""

    shard: Shard = "column"

    def __init__(self, ctx: ModelContext, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        each = -(-vocab_size // ctx.world_size)
        self.first, self.vocab_size, self.device = ctx.rank * each, vocab_size, ctx.device
        source = slice(self.first, min(self.first + each, vocab_size))
        self.parts = {"": Part(vocab_size, source, slice(0, source.stop - source.start))}
        self.weight = empty(ctx, each, hidden_size)
        self._gather = ctx.ops.resolve("embedding", dtype=ctx.dtype, hidden_size=hidden_size)
        self._reduce = ctx.ops.resolve("all_reduce", world_size=ctx.world_size) if ctx.world_size > 1 else None
        self._rows: Callable[[Tensor], Tensor] | None = None

    @property
    def expected(self) -> frozenset[str]:
        return frozenset({"weight"})

    def load(self, part: str, tensor: Tensor) -> list[str]:
        if part != "weight":
            raise UnknownPart(part)
        if len(tensor) != self.vocab_size:
            raise ConfigError(f"it has {len(tensor)} rows, the model's vocabulary {self.vocab_size}")
        place = self.parts[""]
        put(self, "weight", tensor[place.source], (place.target,), self.device)
        return [part]

    def finish(self) -> None: ...

    def read_from(self, rows: Callable[[Tensor], Tensor]) -> None:
        """From now on rows are read by `rows` (ids [T] → [T, H]); the plain weight is let go."""
        self._rows = rows
        release(self, "weight")

    def forward(self, ids: Tensor) -> Tensor:
        if self._reduce is None:
            return self._look_up(ids)
        local = ids - self.first
        held = (local >= 0) & (local < self.weight.shape[0])
        return self._reduce(self._look_up(local.where(held, 0)) * held[:, None])

    def _look_up(self, ids: Tensor) -> Tensor:
        return self._gather(ids, self.weight) if self._rows is None else self._rows(ids)


class TiedHead(nn.Module):
    """Logits by the embedding's own weight: hidden [N, H] → [N, V / ranks]."""

    shard: Shard = "column"

    def __init__(self, ctx: ModelContext, embedding: VocabEmbedding) -> None:
        super().__init__()
        self.parts: dict[str, Part] = {}
        self.format, self._ops = "plain", ctx.ops
        self._embedding = (embedding,)  # in a tuple: not a submodule a second time
        self._op: Callable[..., Tensor] | None = None
        self._state: Any = None

    @property
    def expected(self) -> frozenset[str]:
        return frozenset()

    def load(self, part: str, tensor: Tensor) -> list[str]:
        """A checkpoint that stores the head although it is tied stores the embedding a second time."""
        if part != "weight":
            raise UnknownPart(part)
        return [part]

    def finish(self) -> None:
        (embedding,) = self._embedding
        rows, width = embedding.weight.shape
        facts = {"dtype": embedding.weight.dtype, "in_features": width, "out_features": rows, "bias": False}
        self._op = self._ops.resolve("linear", format=self.format, tied=True, **facts)
        self._state = prepare(self._op, embedding.weight, None)
        read = getattr(self._op, "rows", None)
        if not keeps_weight(self._op) and read is not None:
            embedding.read_from(lambda ids: read(self._state, ids))

    def forward(self, x: Tensor) -> Tensor:
        return self._op(x, self._state)


class LogitsHead(nn.Module):
    """Hidden [N, H] → logits [N, V], gathered from the ranks. `tied`: the embedding whose weight it uses."""

    def __init__(
        self, ctx: ModelContext, vocab_size: int, hidden_size: int, tied: VocabEmbedding | None = None, cap: float | None = None
    ) -> None:
        super().__init__()
        each = -(-vocab_size // ctx.world_size)
        self.vocab_size, self.cap = vocab_size, cap
        self.projection = TiedHead(ctx, tied) if tied else VocabLinear(ctx, vocab_size, hidden_size, each)
        self._gather = ctx.ops.resolve("all_gather", world_size=ctx.world_size) if ctx.world_size > 1 else None
        self._soft_cap = ctx.ops.resolve("soft_cap", dtype=ctx.dtype) if cap else None

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.projection(hidden)
        if self._gather is not None:
            logits = self._gather(logits)[:, : self.vocab_size]
        return logits if self._soft_cap is None else self._soft_cap(logits, self.cap)


class VocabLinear(Linear):
    """A head with a weight of its own: the rank's rows of the vocabulary, padded to a multiple of the ranks."""

    def __init__(self, ctx: ModelContext, vocab_size: int, hidden_size: int, each: int) -> None:
        super().__init__(ctx, hidden_size, each)
        source = slice(ctx.rank * each, min((ctx.rank + 1) * each, vocab_size))
        self.shard = "column"
        self.parts = {"": Part(vocab_size, source, slice(0, source.stop - source.start))}


class Norm(nn.Module):
    """x [T, H] and perhaps a residual that is added first → (normalised, the sum). Every rank holds it whole."""

    def __init__(self, ctx: ModelContext, size: int, eps: float, op: str, bias: bool, **facts: int) -> None:
        super().__init__()
        self.eps, self.device, self._facts = eps, ctx.device, facts
        self.weight = empty(ctx, size)
        self.bias = empty(ctx, size) if bias else None
        self._op = ctx.ops.resolve(op, dtype=ctx.dtype, size=size, **facts)

    @property
    def expected(self) -> frozenset[str]:
        return frozenset({"weight"} if self.bias is None else {"weight", "bias"})

    def load(self, part: str, tensor: Tensor) -> list[str]:
        if part not in self.expected:
            raise UnknownPart(part)
        put(self, part, tensor, (slice(None),), self.device)
        return [part]

    def finish(self) -> None: ...


class RMSNorm(Norm):
    """offset 1: the weight is stored as its distance from one."""

    def __init__(self, ctx: ModelContext, size: int, eps: float, offset: int = 0) -> None:
        super().__init__(ctx, size, eps, "rms_norm", bias=False, offset=offset)
        self.offset = offset

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._op(x, self.weight, self.eps, residual, self.offset)


class LayerNorm(Norm):
    def __init__(self, ctx: ModelContext, size: int, eps: float, bias: bool = True) -> None:
        super().__init__(ctx, size, eps, "layer_norm", bias=bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._op(x, self.weight, self.bias, self.eps, residual)


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, ctx: ModelContext, hidden_size: int, intermediate_size: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        half = Output(intermediate_size, intermediate_size)
        self.gate_up = Linear(ctx, hidden_size, {"gate": half, "up": half}, bias=bias, shard="column")
        self.down = Linear(ctx, intermediate_size, hidden_size, bias=bias, shard="row")
        self._activation = activation_op(activation)
        self._act_mul = ctx.ops.resolve(gated_op(activation), dtype=ctx.dtype, size=self.down.in_features)

    def forward(self, x: Tensor) -> Tensor:
        fused = getattr(self.gate_up, "gated", None)  # what has taken the linear's place may not have it
        y = None if fused is None else fused(x, self._activation)
        return self.down(self._act_mul(self.gate_up(x)) if y is None else y)


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """One attention layer. `window` w: position p sees p-w+1 .. p. `scale` None: 1 / sqrt(head_dim). `qk_norm_eps`: q and k
    are normalised per head, with `qk_norm_offset` as in `RMSNorm`."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: float | None = None
    qk_norm_offset: int = 0


class Attention(nn.Module):
    """Fused projections, head norms, rotation, the device's attention over the paged KV, and the output projection.
    `spec` is what the kernel reads: this rank's heads. `layer` is the unique path that keys its KV."""

    def __init__(self, ctx: ModelContext, layer: str, shape: AttentionShape, rotary: Rotary | None) -> None:
        super().__init__()
        dim, heads, kv_heads = shape.head_dim, shape.num_heads, shape.num_kv_heads
        outputs = {"q": Output(heads * dim, heads), "k": Output(kv_heads * dim, kv_heads), "v": Output(kv_heads * dim, kv_heads)}
        self.qkv = Linear(ctx, shape.hidden_size, outputs, bias=shape.qkv_bias, shard="column")
        self.out = Linear(ctx, heads * dim, shape.hidden_size, bias=shape.out_bias, shard="row")
        self.q_norm = self.k_norm = None
        if shape.qk_norm_eps is not None:
            self.q_norm, self.k_norm = (RMSNorm(ctx, dim, shape.qk_norm_eps, shape.qk_norm_offset) for _ in range(2))
        self.rotary = rotary
        self.sizes = [part.target.stop - part.target.start for part in self.qkv.parts.values()]
        self.spec = AttentionSpec(
            layer=layer,
            num_heads=self.sizes[0] // dim,
            num_kv_heads=self.sizes[1] // dim,
            head_dim=dim,
            v_head_dim=dim,
            scale=dim**-0.5 if shape.scale is None else shape.scale,
            kind="full" if shape.window is None else "window",
            window=shape.window,
            soft_cap=shape.soft_cap,
        )
        self.backend = ctx.attention(self.spec)
        self._prepared = getattr(self.backend, "prepared_forward", None) if type(rotary) is Rotary else None

    def forward(self, x: Tensor, fwd: Forward) -> Tensor:
        """x [T, H] → [T, H]."""
        spec = self.spec
        q, k, v = (y.unflatten(-1, (-1, spec.head_dim)) for y in self.qkv(x).split(self.sizes, -1))
        if self._prepared is not None and fwd.positions.dim() == 1:
            y = self._prepared(q, k, v, fwd.kv[spec.layer], fwd.attention[spec.layer], spec, None, self._heads(fwd.positions))
            return self.out(y.flatten(1))
        if self.q_norm is not None:
            q, k = (norm(y.reshape(-1, spec.head_dim))[0].view(y.shape) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        if self.rotary is not None:
            q, k = self.rotary(q, k, fwd.positions)
        y = self.backend.forward(q, k, v, fwd.kv[spec.layer], fwd.attention[spec.layer], spec, None)
        return self.out(y.flatten(1))

    def _heads(self, positions: Tensor) -> HeadPreparation:
        """What comes between the projections and the attention, for a backend that does it too."""
        rotary, q_norm, k_norm = self.rotary, self.q_norm, self.k_norm
        tables = (rotary.cos, rotary.sin, positions, rotary.rope.interleaved)
        return (
            HeadPreparation(*tables)
            if q_norm is None
            else HeadPreparation(*tables, q_norm.weight, k_norm.weight, q_norm.eps, q_norm.offset)
        )
