"""The oracle: paged attention in plain torch, row by row, softmax in float32. Supports everything a layer can declare.

Every other backend is checked against it. It is simple, not fast: it reads lengths on the host and loops over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil

import torch
from torch import Tensor

from kernel_core.nn.protocols import AttentionBatch, AttentionSpec

KINDS = ("full", "window")


@dataclass(slots=True)
class RowPlan:
    """One row: its tokens [begin, end) of the step, the cache slots it reads, and the masks [q, keys] by (causal, first slot)."""

    begin: int
    end: int
    slots: Tensor
    mask: dict[tuple[bool, int], Tensor]


@dataclass(slots=True)
class ReferencePlan:
    written: Tensor  # indices into the step's tokens
    slots: Tensor  # cache slots they are written to
    rows: list[RowPlan] = field(default_factory=list)


class ReferenceAttention:
    """KV of a layer: (keys [slots, Hkv, D], values [slots, Hkv, Dv]), slot = block * block_size + offset."""

    name = "torch:reference"
    priority = 0

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def supports(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> bool:
        return spec.kind in KINDS and spec.algorithm == "softmax" and dtype.is_floating_point

    def bytes_per_block(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> int:
        return block_size * spec.num_kv_heads * (spec.head_dim + spec.v_head_dim) * dtype.itemsize

    def allocate(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, num_blocks: int) -> tuple[Tensor, Tensor]:
        slots = num_blocks * block_size
        return tuple(
            torch.zeros(slots, spec.num_kv_heads, dim, dtype=dtype, device=self.device)
            for dim in (spec.head_dim, spec.v_head_dim)
        )

    def plan(self, batch: AttentionBatch, specs: Sequence[AttentionSpec]) -> ReferencePlan:
        written = (batch.slot_mapping >= 0).nonzero().flatten()
        plan = ReferencePlan(written, batch.slot_mapping[written])
        starts, lengths = batch.q_start.tolist(), batch.kv_len.tolist()
        kinds = {(spec.causal, spec.first_slot) for spec in specs}
        for row, length in enumerate(lengths):
            plan.rows.append(_plan_row(batch, row, starts[row], starts[row + 1], length, specs[0].window, kinds))
        return plan

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: tuple[Tensor, Tensor],
        plan: ReferencePlan,
        spec: AttentionSpec,
        sinks: Tensor | None,
    ) -> Tensor:
        keys, values = kv
        keys[plan.slots] = k[plan.written].to(keys.dtype)
        values[plan.slots] = v[plan.written].to(values.dtype)
        out = q.new_empty(q.shape[0], spec.num_heads, spec.v_head_dim)
        for row in plan.rows:
            mask = row.mask[spec.causal, spec.first_slot]
            out[row.begin : row.end] = attend(q[row.begin : row.end], keys[row.slots], values[row.slots], mask, spec, sinks)
        return out

    def blocks(self, kv: tuple[Tensor, Tensor], spec: AttentionSpec, block_size: int) -> Sequence[Tensor]:
        return [cache.unflatten(0, (-1, block_size)) for cache in kv]

    def copy_kv(self, kv: tuple[Tensor, Tensor], spec: AttentionSpec, src: Tensor, dst: Tensor) -> None:
        for cache in kv:
            cache[dst] = cache[src]


def _plan_row(
    batch: AttentionBatch, row: int, begin: int, end: int, length: int, window: int | None, kinds: set[tuple[bool, int]]
) -> RowPlan:
    """Cache slots of the positions that some query of the row may see, and who sees which."""
    device = batch.block_table.device
    context = length - (end - begin)
    slot_position = torch.arange(context, length, device=device)
    position = slot_position if batch.positions is None else batch.positions[begin:end]
    first = 0 if window is None else max(0, min(context, int(position.min()) - window + 1))
    key = torch.arange(first, length, device=device)
    blocks = batch.block_table[row, : ceil(length / batch.block_size)].long()
    slots = blocks[key // batch.block_size] * batch.block_size + key % batch.block_size
    seen = slot_position[:, None] >= key[None, :]
    near = seen.new_ones(seen.shape) if window is None else (position[:, None] - key[None, :]).abs() < window
    if batch.tree is not None:  # the row's own tokens see each other as the tree says, window included
        seen[:, context - first :] = batch.tree[begin:end, : end - begin]
        near[:, context - first :] = True
    masks = {True: seen & near, False: near}
    return RowPlan(begin, end, slots, {kind: masks[kind[0]] & (key >= kind[1]) for kind in kinds})


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
    """q [n, Hq, D], k [m, Hkv, D], v [m, Hkv, Dv], mask [n, m] (True: seen) → [n, Hq, Dv] in q's dtype."""
    group = spec.num_heads // spec.num_kv_heads
    keys, values = (t.float().repeat_interleave(group, 1).transpose(0, 1) for t in (k, v))
    scores = (q.float().transpose(0, 1) @ keys.transpose(1, 2)) * spec.scale
    if spec.soft_cap is not None:
        scores = torch.tanh(scores / spec.soft_cap) * spec.soft_cap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return _weighted(weights, values, mask).transpose(0, 1).to(q.dtype)


def _weighted(weights: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """weights @ values where what a query does not see cannot reach it, not even as 0 * NaN from an unwritten slot."""
    if values.isfinite().all():
        return weights @ values
    broken = ~values.isfinite().all(-1).all(0)
    out = weights @ values.masked_fill(broken[None, :, None], 0.0)
    return out.masked_fill((mask & broken).any(-1)[None, :, None], float("nan"))
