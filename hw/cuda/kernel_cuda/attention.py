"""Paged attention as the kernel's attention contract wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from kernel_core.nn.api import AttentionBatch, AttentionSpec, HeadPreparation
from kernel_cuda import flash
from kernel_cuda.kernels import attention, pointwise
from kernel_cuda.kernels.attention import Cache, Rules, Work

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_BYTES = 8  # per token and head of an FP8 cache


class Plan:
    """A step: the batch, and its work for each number of query heads per KV head, listed when a layer first asks for it."""

    def __init__(self, batch: AttentionBatch, make_work: Callable[[AttentionBatch], Mapping[int, Work]]) -> None:
        self.batch, self._make_work = batch, make_work
        self._work: Mapping[int, Work] | None = None

    @property
    def work(self) -> Mapping[int, Work]:
        if self._work is None:
            self._work = self._make_work(self.batch)
        return self._work

    def of(self, batch: AttentionBatch) -> Plan:
        """The plan of the same layers for another batch."""
        return Plan(batch, self._make_work)


class CudaAttention:
    """Split-KV decoding and flash prefill over the paged cache. Every method of rate step or graph can be captured into a
    CUDA graph; launch sizes follow from the shapes of the batch, `max_q` and `max_kv` alone.

    `dtype`: of the queries, the model's. `fp8`: KV is kept as e4m3 numbers with a float32 scale per token and head."""

    priority = 100

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.bfloat16, fp8: bool = False) -> None:
        self.device, self.wide, self.fp8 = device, dtype == torch.float32, fp8
        self._flash = device.type == "cuda" and not self.wide and flash.works(device, dtype)
        self.name = "cuda:paged-fp8" if fp8 else "cuda:paged"

    def supports(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> bool:
        return (
            spec.kind in ("full", "window")
            and spec.algorithm == "softmax"
            and dtype in DTYPES
            and all(dim % 8 == 0 and dim <= 256 for dim in (spec.head_dim, spec.v_head_dim))
        )

    def bytes_per_block(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> int:
        dims = spec.head_dim + spec.v_head_dim
        return block_size * spec.num_kv_heads * (dims + SCALE_BYTES if self.fp8 else dims * dtype.itemsize)

    def allocate(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, num_blocks: int) -> Cache:
        kept = torch.uint8 if self.fp8 else dtype
        shape = (num_blocks, spec.num_kv_heads, block_size)
        k, v = (torch.zeros(*shape, d, dtype=kept, device=self.device) for d in (spec.head_dim, spec.v_head_dim))
        return Cache(k, v, torch.zeros(*shape, 2, device=self.device) if self.fp8 else None)

    def plan(self, batch: AttentionBatch, specs: Sequence[AttentionSpec]) -> Plan:
        return Plan(batch, partial(self._work, specs))

    def _work(self, specs: Sequence[AttentionSpec], batch: AttentionBatch) -> Mapping[int, Work]:
        work: dict[int, Work] = {}
        for spec in specs:
            group = spec.num_heads // spec.num_kv_heads
            if group not in work:
                row_bytes = max(4 * (s.v_head_dim + 1) * s.num_heads for s in specs)
                work[group] = attention.plan(
                    batch.q_start, batch.kv_len, batch.max_q, batch.max_kv, batch.slot_mapping.shape[0], group, spec.window,
                    row_bytes, self.wide,
                )  # fmt: skip
        return work

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv: Cache, plan: Plan, spec: AttentionSpec, sinks: Tensor | None
    ) -> Tensor:
        q, k, v = (_unit(x) for x in (q, k, v))
        attention.write(kv, k, v, plan.batch.slot_mapping)
        if self._stands_alone(plan.batch, spec, sinks):
            return flash.attend(q, k, v, plan.batch.q_start, plan.batch.max_q, spec.scale, spec.window)
        return self._attend(q, kv, plan, spec, sinks)

    def prepared_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kv: Cache,
        plan: Plan,
        spec: AttentionSpec,
        sinks: Tensor | None,
        heads: HeadPreparation,
    ) -> Tensor:
        """`forward` of q and k that are normalised and rotated here, in the launch that writes the cache."""
        if self._stands_alone(plan.batch, spec, sinks):
            return self.forward(*_prepared(q, k, heads), v, kv, plan, spec, sinks)
        q, k, v = (_unit(x) for x in (q, k, v))
        attention.prepare(
            q, k, v, kv, plan.batch.slot_mapping, heads.cos, heads.sin, heads.positions, heads.interleaved,
            heads.q_weight, heads.k_weight, heads.eps, heads.offset,
        )  # fmt: skip
        return self._attend(q, kv, plan, spec, sinks)

    def _stands_alone(self, batch: AttentionBatch, spec: AttentionSpec, sinks: Tensor | None) -> bool:
        """Whole prompts attend to themselves: torch's own kernel does that without the cache."""
        plain = spec.causal and not spec.soft_cap and not spec.first_slot and spec.head_dim == spec.v_head_dim
        return self._flash and batch.fresh and plain and sinks is None and batch.max_q > 1

    def _attend(self, q: Tensor, kv: Cache, plan: Plan, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
        batch, work = plan.batch, plan.work[spec.num_heads // spec.num_kv_heads]
        rules = Rules(spec.scale, spec.window, spec.soft_cap, spec.causal, spec.first_slot)
        return attention.attend(q, kv, work, batch.block_table, rules, sinks, batch.tree, batch.positions)

    def blocks(self, kv: Cache, spec: AttentionSpec, block_size: int) -> Sequence[Tensor]:
        return [part for part in (kv.k, kv.v, kv.scales) if part is not None]

    def copy_kv(self, kv: Cache, spec: AttentionSpec, src: Tensor, dst: Tensor) -> None:
        attention.copy_tokens(kv, src, dst)


def _prepared(q: Tensor, k: Tensor, heads: HeadPreparation) -> tuple[Tensor, Tensor]:
    """q and k after their norm and rotation."""
    if heads.q_weight is not None:
        q, k = (
            pointwise.rms_norm(x.reshape(-1, x.shape[2]), weight, heads.eps, None, heads.offset)[0].view(x.shape)
            for x, weight in ((q, heads.q_weight), (k, heads.k_weight))
        )
    return pointwise.rotary(q, k, heads.cos, heads.sin, heads.positions, heads.interleaved)


def _unit(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()
