"""A mixture of experts in the place of an MLP. Ranks share every expert's intermediate channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kernel_core.errors import ConfigError
from kernel_core.nn.layers import Linear, Shard, UnknownPart, activation_op, empty, put, release, shard_units
from kernel_core.nn.ops import keeps_weight, prepare
from kernel_core.nn.protocols import ModelContext


@dataclass(frozen=True, slots=True)
class MoEShape:
    """`renormalise`: the weights of the `top_k` chosen experts sum to one."""

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalise: bool = True


class Experts(nn.Module):
    """All experts of a layer. Parts: "3.gate.weight", "3.up.weight", "3.down.weight", or stacked over the experts:
    "gate+up" [E, 2F, H] and "down" [E, H, F]."""

    shard: Shard = "column"

    def __init__(self, ctx: ModelContext, hidden_size: int, shape: MoEShape, activation: str) -> None:
        super().__init__()
        first, last = shard_units(shape.intermediate_size, ctx.rank, ctx.world_size)
        self.mine, self.size, self.device, self._ops = slice(first, last), last - first, ctx.device, ctx.ops
        self.shape, self.format, self.activation = shape, "plain", activation_op(activation)
        self.gate_up = empty(ctx, shape.num_experts, 2 * self.size, hidden_size)
        self.down = empty(ctx, shape.num_experts, hidden_size, self.size)
        self.parts = {name: self.mine for name in ("gate", "up", "down")}
        self._op: Any = None
        self._state: Any = None

    @property
    def expected(self) -> frozenset[str]:
        return frozenset(f"{e}.{part}.weight" for e in range(self.shape.num_experts) for part in self.parts)

    def load(self, part: str, tensor: Tensor) -> list[str]:
        """Take in a checkpoint tensor; the names of the parts it filled. Raises UnknownPart, ConfigError for its shape."""
        if part in ("gate+up", "down"):
            return self._load_stacked(part, tensor)
        if part not in self.expected:
            raise UnknownPart(part)
        expert, name, _ = part.split(".")
        self._put(slice(int(expert), int(expert) + 1), name, tensor[None])
        return [part]

    def _load_stacked(self, part: str, tensor: Tensor) -> list[str]:
        experts, names = slice(0, self.shape.num_experts), part.split("+")
        for name, piece in zip(names, tensor.chunk(len(names), 1)):
            self._put(experts, name, piece)
        return [f"{e}.{name}.weight" for e in range(self.shape.num_experts) for name in names]

    def _put(self, experts: slice, name: str, tensor: Tensor) -> None:
        """tensor [e, F, H] (gate, up) or [e, H, F] (down), of all ranks."""
        width = tensor.shape[2 if name == "down" else 1]
        if width != self.shape.intermediate_size:
            raise ConfigError(f"it has the shape {tuple(tensor.shape)}, the experts {self.shape.intermediate_size} channels")
        if name == "down":
            put(self, "down", tensor[:, :, self.mine], (experts,), self.device)
        else:
            begin = 0 if name == "gate" else self.size
            put(self, "gate_up", tensor[:, self.mine], (experts, slice(begin, begin + self.size)), self.device)

    def finish(self) -> None:
        self._op = self._ops.resolve(
            "moe",
            dtype=self.down.dtype,
            format=self.format,
            activation=self.activation,
            num_experts=self.shape.num_experts,
            intermediate_size=self.size,
        )
        self._state = prepare(self._op, self.gate_up, self.down)
        if not keeps_weight(self._op):
            release(self, "gate_up")
            release(self, "down")

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        return self._op(x, logits, self._state, self.shape.top_k, self.shape.renormalise)


class MoE(nn.Module):
    """x [T, H] → [T, H]: a router and its experts."""

    def __init__(self, ctx: ModelContext, hidden_size: int, shape: MoEShape, activation: str) -> None:
        super().__init__()
        self.router = Linear(ctx, hidden_size, shape.num_experts)
        self.experts = Experts(ctx, hidden_size, shape, activation)
        self._reduce = ctx.ops.resolve("all_reduce", world_size=ctx.world_size) if ctx.world_size > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.experts(x, self.router(x))
        return y if self._reduce is None else self._reduce(y)
