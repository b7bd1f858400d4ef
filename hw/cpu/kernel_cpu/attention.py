"""Attention over a paged KV cache: decode, prefill and mixed batches in one call, without copying the cache."""

from __future__ import annotations

import ctypes
import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_cpu import build

_DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class KV:
    """One layer's cache: ``num_blocks`` blocks of ``block_size`` tokens. What lies where is the kernels' business.

    ``data`` [num_blocks, num_kv_heads, page]: block b is the contiguous ``data[b]`` and may be moved as a whole. A page holds
    strips of 16 tokens, K and V side by side, as the kernels multiply them: 16 * (head_dim + v_head_dim rounded up to 16)
    elements each, so block sizes that are multiples of 16 waste nothing.
    """

    data: Tensor
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    plain: bool = False  # without compiled kernels: page = [block_size, head_dim + v_head_dim]

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def _geometry(self) -> tuple[int, ...]:
        is_bf16 = self.data.dtype == torch.bfloat16
        return (
            self.data.data_ptr(),
            is_bf16,
            self.num_blocks,
            self.block_size,
            self.num_kv_heads,
            self.head_dim,
            self.v_head_dim,
        )


def allocate_kv(
    num_blocks: int,
    block_size: int,
    num_kv_heads: int,
    head_dim: int,
    v_head_dim: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> KV:
    """A zeroed cache in bf16 or fp32. Head dimensions are multiples of 8 up to 256 (ValueError otherwise)."""
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    if any(d % 8 or not 0 < d <= 256 for d in (head_dim, v_head_dim)):
        raise ValueError(f"head dimensions {head_dim}, {v_head_dim}: expected multiples of 8 up to 256")
    if dtype not in _DTYPES:
        raise TypeError(f"cache {dtype}: expected bf16 or fp32")
    page = kv_page_elements(block_size, head_dim, v_head_dim)
    data = _lazily_zeroed(num_blocks, num_kv_heads, page, dtype=dtype)
    kernels = build.library()
    if kernels and data.nbytes >= 1 << 21:
        kernels.kc_advise_huge(data.data_ptr(), data.nbytes)
    return KV(data, num_blocks, block_size, num_kv_heads, head_dim, v_head_dim, plain=kernels is None)


def _lazily_zeroed(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros that the system makes page by page when they are first touched: start-up does not wait for a large cache."""
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape) if size else torch.zeros(shape, dtype=dtype)


def kv_page_elements(block_size: int, head_dim: int, v_head_dim: int) -> int:
    """Elements that one block of one KV head occupies."""
    kernels = build.library()
    return kernels.kc_kv_page(block_size, head_dim, v_head_dim) if kernels else block_size * (head_dim + v_head_dim)


def write_kv(kv: KV, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
    """Stores k [T, Hkv, D] and v [T, Hkv, Dv] (bf16 or fp32, rounded to the cache's dtype) at slots int64 [T].

    A slot is block * block_size + offset; -1 is not written. k and v may be views with any token and head strides.
    Raises IndexError for a slot past the last block.
    """
    tokens = slot_mapping.shape[0]
    if k.shape != (tokens, kv.num_kv_heads, kv.head_dim) or v.shape != (tokens, kv.num_kv_heads, kv.v_head_dim):
        raise ValueError(f"k {tuple(k.shape)}, v {tuple(v.shape)} for {tokens} slots")
    if k.dtype != v.dtype or k.dtype not in _DTYPES:
        raise TypeError(f"k {k.dtype}, v {v.dtype}: expected both bf16 or both fp32")
    slots = slot_mapping.to(torch.int64).contiguous()
    if kv.plain:
        keep = slots >= 0
        page = _plain_pages(kv)
        page[slots[keep] // kv.block_size, :, slots[keep] % kv.block_size] = torch.cat([k, v], -1)[keep].to(kv.dtype)
        return
    k, v = _rows(k), _rows(v)
    if _kernels().kc_kv_write(
        *kv._geometry(), k.data_ptr(), k.stride(0), k.stride(1), v.data_ptr(), v.stride(0), v.stride(1),
        k.dtype == torch.bfloat16, slots.data_ptr(), tokens,
    ):  # fmt: skip
        raise IndexError("slot past the last block")


def copy_kv(kv: KV, src_slots: Tensor, dst_slots: Tensor) -> None:
    """Copies tokens from src to dst, int64 [n] each, one after another. Raises IndexError for a slot outside the cache."""
    src, dst = src_slots.to(torch.int64).contiguous(), dst_slots.to(torch.int64).contiguous()
    if src.shape != dst.shape:
        raise ValueError(f"{len(src)} source slots for {len(dst)} destinations")
    if kv.plain:
        for a, b in zip(src.tolist(), dst.tolist(), strict=True):
            page = _plain_pages(kv)
            page[b // kv.block_size, :, b % kv.block_size] = page[a // kv.block_size, :, a % kv.block_size]
    elif _kernels().kc_kv_copy(*kv._geometry(), src.data_ptr(), dst.data_ptr(), len(src)):
        raise IndexError("slot outside the cache")


def read_kv(kv: KV, slots: Tensor) -> tuple[Tensor, Tensor]:
    """k [n, Hkv, D] and v [n, Hkv, Dv] at slots int64 [n], in the cache's dtype. Raises IndexError as ``copy_kv`` does."""
    slots = slots.to(torch.int64).contiguous()
    if kv.plain:
        both = _plain_pages(kv)[slots // kv.block_size, :, slots % kv.block_size]
        return both[..., : kv.head_dim].contiguous(), both[..., kv.head_dim :].contiguous()
    k = torch.empty(len(slots), kv.num_kv_heads, kv.head_dim, dtype=kv.dtype)
    v = torch.empty(len(slots), kv.num_kv_heads, kv.v_head_dim, dtype=kv.dtype)
    if _kernels().kc_kv_read(*kv._geometry(), slots.data_ptr(), len(slots), k.data_ptr(), v.data_ptr()):
        raise IndexError("slot outside the cache")
    return k, v


def paged_attention(
    q: Tensor,
    kv: KV,
    q_start: Tensor,
    kv_len: Tensor,
    block_table: Tensor,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    tree: Tensor | None = None,
    causal: bool = True,
    out: Tensor | None = None,
    positions: Tensor | None = None,
    first_slot: int = 0,
) -> Tensor:
    """softmax(q k^T * scale) v for each row over its own blocks; returns [T, Hq, Dv] in q's dtype.

    q [T, Hq, D] bf16 or fp32, any token and head strides; q_start int32 [R+1]: row r has the queries q_start[r] to
    q_start[r+1]; kv_len int32 [R]: its tokens in the cache, those of this step included; block_table int32 [R, B]. Query j of a
    row stands at position kv_len - q_len + j and sees the positions up to its own, with ``window`` the last ``window`` of them.
    ``soft_cap``: scores become cap * tanh(score / cap). ``sinks`` fp32 [Hq]: one more key per head with that score and no
    value. ``causal`` false: every query sees all kv_len positions, with ``window`` those less than ``window`` away. Positions
    below ``first_slot`` are seen by nobody, and their values never read. ``tree`` bool [T, W]: in rows of at most W queries,
    query j sees of the row's own queries just those i with tree[q_start + j, i], besides all earlier tokens; longer rows
    are causal; the window counts slots, or from ``positions`` int64 [T] of the queries. A query that sees nothing gets zeros.

    Sums and softmax are fp32; where a machine multiplies bf16, the weights are rounded to bf16 before they meet bf16 values, as
    torch and flash attention do. The result of a query is bitwise the same in any batch and however its prompt was chunked.
    Only slots that a query may see are read. Raises ValueError for shapes that do not fit, IndexError for a row longer than
    its cache or a needed block that does not exist.
    """
    tokens, heads, _ = q.shape
    rows = kv_len.shape[0]
    if q.shape[2] != kv.head_dim or heads % kv.num_kv_heads or q_start.shape[0] != rows + 1 or block_table.shape[0] != rows:
        raise ValueError(
            f"q {tuple(q.shape)}, {rows} rows, q_start {tuple(q_start.shape)}, block_table {tuple(block_table.shape)}"
        )
    if scale <= 0:
        raise ValueError(f"scale {scale}: expected a positive one")
    if q.dtype not in _DTYPES:
        raise TypeError(f"queries {q.dtype}: expected bf16 or fp32")
    if (sinks is not None and sinks.shape != (heads,)) or (tree is not None and tree.shape[0] != tokens):
        raise ValueError("sinks must be [Hq] and tree [T, W]")
    if out is None:
        out = torch.empty(tokens, heads, kv.v_head_dim, dtype=q.dtype)
    elif out.shape != (tokens, heads, kv.v_head_dim) or out.dtype != q.dtype or out.stride(2) != 1:
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} for queries {tuple(q.shape)} {q.dtype}")
    if kv.plain:
        rules = _Rules(scale, window, soft_cap, sinks, causal, first_slot)
        return _plain_attention(q, kv, q_start, kv_len, block_table, rules, tree, out, positions)
    q = _rows(q)
    q_start, kv_len, block_table = _int32(q_start), _int32(kv_len), _int32(block_table)
    sinks = None if sinks is None else sinks.to(torch.float32).contiguous()
    tree = None if tree is None else tree.to(torch.bool).contiguous()
    positions = None if positions is None else positions.to(torch.int64).contiguous()
    if _kernels().kc_attention(
        q.data_ptr(), q.dtype == torch.bfloat16, q.stride(0), q.stride(1), *kv._geometry(),
        q_start.data_ptr(), kv_len.data_ptr(), block_table.data_ptr(), block_table.shape[1], rows, heads,
        scale, window or 0, first_slot, soft_cap or 0.0, None if sinks is None else sinks.data_ptr(),
        None if tree is None else tree.data_ptr(), 0 if tree is None else tree.shape[1],
        None if positions is None else positions.data_ptr(), causal,
        out.data_ptr(), out.stride(0), out.stride(1),
    ):  # fmt: skip
        raise IndexError("a row is longer than its cache, or names a block that does not exist")
    return out


def _kernels() -> ctypes.CDLL:
    kernels = build.library()
    assert kernels is not None
    return kernels


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _plain_pages(kv: KV) -> Tensor:
    return kv.data.view(kv.num_blocks, kv.num_kv_heads, kv.block_size, kv.head_dim + kv.v_head_dim)


@dataclass(frozen=True)
class _Rules:
    """What a query may see and how its scores are formed; the arguments of ``paged_attention``."""

    scale: float
    window: int | None
    soft_cap: float | None
    sinks: Tensor | None
    causal: bool
    first_slot: int


def _plain_row(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, rules: _Rules) -> Tensor:
    """One row in torch, in fp32, the group of query heads folded into the rows of one product: [q_len, Hq, Dv]."""
    count, heads, dim = q.shape
    grouped = q.float().view(count, k.shape[1], -1, dim).permute(1, 2, 0, 3)
    scores = grouped @ k.float().permute(1, 2, 0)[:, None] * rules.scale
    if rules.soft_cap:
        scores = torch.tanh(scores / rules.soft_cap) * rules.soft_cap
    scores = scores.masked_fill(~visible, -torch.inf)
    if rules.sinks is not None:
        sink = rules.sinks.float().view(k.shape[1], -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1).masked_fill(~visible.any(1)[:, None], 0.0)
    result = weights[..., : k.shape[0]] @ v.float().permute(1, 0, 2)[:, None]
    return result.permute(2, 0, 1, 3).reshape(count, heads, v.shape[2])


def _plain_attention(
    q: Tensor,
    kv: KV,
    q_start: Tensor,
    kv_len: Tensor,
    block_table: Tensor,
    rules: _Rules,
    tree: Tensor | None,
    out: Tensor,
    positions: Tensor | None,
) -> Tensor:
    starts = q_start.tolist()
    for r, length in enumerate(kv_len.tolist()):
        a, b = starts[r], starts[r + 1]
        if a == b:
            continue
        own = torch.arange(length - b + a, length) if positions is None else positions[a:b]
        visible = _visible(own, length, rules, None if tree is None else tree[a:b])
        first = int(visible.any(0).nonzero()[0]) if visible.any() else length
        slots = torch.arange(first, length)
        k, v = read_kv(kv, block_table[r].long()[slots // kv.block_size] * kv.block_size + slots % kv.block_size)
        out[a:b] = _plain_row(q[a:b], k, v, visible[:, first:], rules).to(out.dtype)
    return out


def _visible(position: Tensor, length: int, rules: _Rules, tree: Tensor | None) -> Tensor:
    """Which of ``length`` slots each of the last queries sees, which stand at position [count]: bool [count, length]."""
    count, seen = len(position), torch.arange(length)
    own = torch.arange(length - count, length)[:, None]
    is_tree = tree is not None and count <= tree.shape[1]
    mask = seen <= own if rules.causal and not is_tree else torch.ones(count, length, dtype=torch.bool)
    if rules.window:
        mask = mask & (seen > position[:, None] - rules.window)
        if not rules.causal and not is_tree:
            mask = mask & (seen < position[:, None] + rules.window)
    if tree is not None and is_tree:
        mask[:, length - count :] &= tree[:, :count]
    return mask & (seen >= rules.first_slot)
