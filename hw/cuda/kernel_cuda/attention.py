"""Paged attention as the kernel's attention contract wants it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kernel_core.nn.api import AttentionBatch, AttentionSpec, HeadPreparation
from kernel_cuda import flash
from kernel_cuda.flash import Flash
from kernel_cuda.kernels import attention, pointwise
from kernel_cuda.kernels.attention import Cache, Rules, Work
from kernel_cuda.split import RULE, Rule, Split, split

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SCALE_BYTES = 8  # per token and head of an FP8 cache


Makes = Callable[[AttentionBatch], Mapping[int, Work]]


class Plan:
    """A step: the batch, and its work for each number of query heads per KV head, listed when a layer first asks for it."""

    def __init__(self, batch: AttentionBatch, make_work: Makes) -> None:
        self.batch, self._make_work = batch, make_work
        self._work: Mapping[int, Work] | None = None
        self._splits: dict[tuple[int, int, int], Parted | None] = {}

    @property
    def work(self) -> Mapping[int, Work]:
        if self._work is None:
            self._work = self._make_work(self.batch)
        return self._work

    def parted(self, spec: AttentionSpec, make: Callable[[], Parted | None]) -> Parted | None:
        """What `make` gives for layers of this one's sizes; it is asked once."""
        sizes = spec.num_heads, spec.num_kv_heads, spec.head_dim
        if sizes not in self._splits:
            self._splits[sizes] = make()
        return self._splits[sizes]

    def of(self, batch: AttentionBatch) -> Plan:
        """The plan of the same layers for another batch."""
        return Plan(batch, self._make_work)


@dataclass(frozen=True, slots=True)
class Parted:
    """A step of which flash takes some rows, and the work of the others (None: there are none)."""

    split: Split
    others: Work | None


class CudaAttention:
    """Split-KV decoding and flash prefill over the paged cache. Every method of rate step or graph can be captured into a
    CUDA graph; launch sizes follow from the shapes of the batch, `max_q` and `max_kv` alone.

    `dtype`: of the queries, the model's. `fp8`: KV is kept as e4m3 numbers with a float32 scale per token and head. `attend`: in
    the place of torch's flash attention, where that does not run. `mixed`: by the `rule`, rows go there also from steps that are
    not all whole prompts."""

    priority = 100

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        fp8: bool = False,
        attend: Flash | None = None,
        rule: Rule = RULE,
        mixed: bool = True,
    ) -> None:
        self.device, self.wide, self.fp8, self.rule = device, dtype == torch.float32, fp8, rule
        self.mixed = mixed
        usable = device.type == "cuda" and not self.wide and flash.works(device, dtype, mixed)
        self._flash = flash.attend if attend is None and usable else attend
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
        groups = {spec.num_heads // spec.num_kv_heads for spec in specs}
        tokens = batch.slot_mapping.shape[0]
        return {group: self._listed(batch, group, specs, batch.kv_len, batch.max_q, tokens) for group in groups}

    def _listed(
        self, batch: AttentionBatch, group: int, specs: Sequence[AttentionSpec], kv_len: Tensor, max_q: int, tokens: int
    ) -> Work:
        row_bytes = max(4 * (spec.v_head_dim + 1) * spec.num_heads for spec in specs)
        window = next(spec.window for spec in specs if spec.num_heads // spec.num_kv_heads == group)
        return attention.plan(batch.q_start, kv_len, max_q, batch.max_kv, tokens, group, window, row_bytes, self.wide)

    def _parted(self, batch: AttentionBatch, spec: AttentionSpec) -> Parted | None:
        parts = split(batch, spec, self.rule)
        if parts is None:
            return None
        group, left = spec.num_heads // spec.num_kv_heads, parts.tokens
        others = self._listed(batch, group, [spec], parts.kv_len, parts.max_q, left) if left else None
        return Parted(parts, others)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv: Cache, plan: Plan, spec: AttentionSpec, sinks: Tensor | None
    ) -> Tensor:
        q, k, v = (_unit(x) for x in (q, k, v))
        attention.write(kv, k, v, plan.batch.slot_mapping)
        if self._stands_alone(plan.batch, spec, sinks):
            starts, most = plan.batch.q_start, plan.batch.max_q
            return self._flash(q, k, v, starts, starts, most, most, spec.scale, spec.window)
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
        return batch.fresh and batch.max_q > 1 and self._flash_does(spec, sinks)

    def _flash_does(self, spec: AttentionSpec, sinks: Tensor | None) -> bool:
        plain = spec.causal and not spec.soft_cap and not spec.first_slot and spec.head_dim == spec.v_head_dim
        return self._flash is not None and plain and sinks is None

    def _attend(self, q: Tensor, kv: Cache, plan: Plan, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
        batch, work, out = plan.batch, None, None
        if self.mixed and not self.fp8 and self._flash_does(spec, sinks):
            parted = plan.parted(spec, lambda: self._parted(batch, spec))
            if parted is not None:
                out, work = self._called(q, kv, parted.split, spec), parted.others
                if work is None:
                    return out
        work = work or plan.work[spec.num_heads // spec.num_kv_heads]
        rules = Rules(spec.scale, spec.window, spec.soft_cap, spec.causal, spec.first_slot)
        return attention.attend(q, kv, work, batch.block_table, rules, sinks, batch.tree, batch.positions, out)

    def _called(self, q: Tensor, kv: Cache, parts: Split, spec: AttentionSpec) -> Tensor:
        """The rows that flash takes; of the others anything."""
        done = []
        for call in parts.calls:
            k, v = attention.gather(kv, call.slots)
            mine, starts, most = q[call.begin : call.end], (call.q_start, call.k_start), (call.max_q, call.max_k)
            done.append(self._flash(mine, k, v, *starts, *most, spec.scale, spec.window))
        return done[0] if len(done) == 1 else torch.cat(done)

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
