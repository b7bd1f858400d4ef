"""Paged attention as the kernel's attention contract wants it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernel_core.nn.api import AttentionBatch, AttentionSpec
from kernel_cpu import attention, build


class PagedAttention:
    """The backend of this device: KV in the kernels' own pages, attention over them in place."""

    priority = 100

    @property
    def name(self) -> str:
        """The layout of the pages differs without compiled kernels."""
        return "cpu:paged" if build.library() else "cpu:plain"

    def supports(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> bool:
        dims = (spec.head_dim, spec.v_head_dim)
        return (
            spec.kind in ("full", "window")
            and spec.algorithm == "softmax"
            and dtype in (torch.bfloat16, torch.float32)
            and all(dim % 8 == 0 and dim <= 256 for dim in dims)
        )

    def bytes_per_block(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> int:
        page = attention.kv_page_elements(block_size, spec.head_dim, spec.v_head_dim)
        return spec.num_kv_heads * page * dtype.itemsize

    def allocate(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, num_blocks: int) -> attention.KV:
        return attention.allocate_kv(num_blocks, block_size, spec.num_kv_heads, spec.head_dim, spec.v_head_dim, dtype)

    def plan(self, batch: AttentionBatch, specs: Sequence[AttentionSpec]) -> AttentionBatch:
        return batch

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, kv: attention.KV, plan: AttentionBatch, spec: AttentionSpec, sinks: Tensor | None
    ) -> Tensor:
        attention.write_kv(kv, k, v, plan.slot_mapping)
        return attention.paged_attention(
            q,
            kv,
            plan.q_start,
            plan.kv_len,
            plan.block_table,
            spec.scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
            sinks=sinks,
            tree=plan.tree,
            causal=spec.causal,
            positions=plan.positions,
            first_slot=spec.first_slot,
        )

    def blocks(self, kv: attention.KV, spec: AttentionSpec, block_size: int) -> Sequence[Tensor]:
        return [kv.data]

    def copy_kv(self, kv: attention.KV, spec: AttentionSpec, src: Tensor, dst: Tensor) -> None:
        attention.copy_kv(kv, src, dst)
