"""Attention over a KV layout of the device's own: [block, head, token, dim], keys and values apart."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class ToyPlan:
    """What all layers of a group share in a step. P is the longest row of the step, K its longest KV."""

    written: Tensor  # step tokens that are stored
    block: Tensor  # and where
    offset: Tensor
    blocks: Tensor  # [R, B] blocks of each row
    query: Tensor  # [R, P] step tokens of each row, padded with its first
    real: Tensor  # [R, P] which of them are no padding
    live: Tensor  # [R, K] which keys exist
    seen: Tensor  # [R, 1, P, K] which key a query sees


class ToyAttention:
    name = "toy:padded"
    priority = 100

    def supports(self, spec, dtype, block_size):
        plain = spec.algorithm == "softmax" and spec.causal and spec.soft_cap is None and not spec.sinks
        return plain and spec.kind in ("full", "window") and dtype == torch.float32

    def bytes_per_block(self, spec, dtype, block_size):
        return block_size * spec.num_kv_heads * (spec.head_dim + spec.v_head_dim) * dtype.itemsize

    def allocate(self, spec, dtype, block_size, num_blocks):
        shapes = [(num_blocks, spec.num_kv_heads, block_size, dim) for dim in (spec.head_dim, spec.v_head_dim)]
        return [torch.zeros(shape, dtype=dtype) for shape in shapes]

    def plan(self, batch, specs):
        first, length = batch.q_start[:-1, None].long(), batch.kv_len[:, None].long()
        count = batch.q_start[1:, None].long() - first
        step = torch.arange(int(count.max()))
        columns = -(-int(length.max()) // batch.block_size)
        key = torch.arange(columns * batch.block_size)
        written = (batch.slot_mapping >= 0).nonzero()[:, 0]
        slot = batch.slot_mapping[written]
        real, live = step < count, key < length
        query = torch.where(real, first + step, first)
        seen = self._seen(batch, specs[0].window, length - count, query, step, key)
        return ToyPlan(
            written=written,
            block=slot // batch.block_size,
            offset=slot % batch.block_size,
            blocks=batch.block_table[:, :columns].long(),
            query=query,
            real=real,
            live=live,
            seen=(seen & live[:, None])[:, None],
        )

    def _seen(self, batch, window, context, query, step, key):
        """[R, P, K]: keys before the step, and of the step's own tokens those that causality or the draft tree allows."""
        place = (context + step)[:, :, None]
        seen = key <= place
        if batch.tree is not None:
            own = (key - context).clamp(0, batch.tree.shape[1] - 1)[:, None].expand(-1, len(step), -1)
            seen = torch.where((key < context)[:, None], True, batch.tree[query].gather(2, own))
        if window is not None:
            at = place if batch.positions is None else batch.positions[query][:, :, None]
            near = at - key < window
            seen = seen & (near if batch.tree is None else near | (key >= context)[:, None])
        return seen

    def forward(self, q, k, v, kv, plan, spec, sinks):
        rows = []
        for cache, new in zip(kv, (k, v)):
            cache[plan.block, :, plan.offset] = new[plan.written]
            row = cache[plan.blocks].transpose(1, 2).flatten(2, 3)  # [R, heads, K, dim]
            rows.append(row.masked_fill(~plan.live[:, None, :, None], 0))
        queries = q[plan.query].transpose(1, 2)  # [R, heads, P, dim]
        out = F.scaled_dot_product_attention(queries, *rows, plan.seen, scale=spec.scale, enable_gqa=True)
        return out.transpose(1, 2)[plan.real]

    def copy_kv(self, kv, spec, src, dst):
        for cache in kv:
            size = cache.shape[2]
            cache[dst // size, :, dst % size] = cache[src // size, :, src % size]
