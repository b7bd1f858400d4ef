"""A mixture of experts: routing, and products of rows grouped by expert. No host reads; everything can be captured."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from kernel_cuda.kernels.pointwise import act_mul, activate

#: (rows [M, K], weight [E, N, K], ends int32 [E]) → [M, N]
Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@triton.jit
def _route(logits, weights, experts, E, stride, TOP: tl.constexpr, EP: tl.constexpr, TP: tl.constexpr, RENORMALISE: tl.constexpr):
    """softmax over the experts of a token, then the best TOP of them, in order; equal ones by number."""
    token = tl.program_id(0).to(tl.int64)
    e, rank = tl.arange(0, EP), tl.arange(0, TP)
    x = tl.load(logits + token * stride + e, mask=e < E, other=float("-inf")).to(tl.float32)
    p = tl.exp(x - tl.max(x, 0))
    p = p / tl.sum(p, 0)
    left = tl.where(e < E, p, -1.0)
    chosen = tl.zeros([TP], tl.float32)
    number = tl.zeros([TP], tl.int32)
    for i in tl.static_range(TOP):
        best = tl.max(left, 0)
        at = tl.min(tl.where(left == best, e, EP), 0)
        chosen = tl.where(rank == i, best, chosen)
        number = tl.where(rank == i, at, number)
        left = tl.where(e == at, -2.0, left)
    if RENORMALISE:
        chosen = chosen / tl.sum(chosen, 0)
    tl.store(weights + token * TOP + rank, chosen, mask=rank < TOP)
    tl.store(experts + token * TOP + rank, number, mask=rank < TOP)


@triton.jit
def _grouped(
    x, w, order, begins, weights, out, N, K, E, x_stride,
    TOP: tl.constexpr, EP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    GATHER: tl.constexpr, GATE: tl.constexpr, IEEE: tl.constexpr,
):  # fmt: skip
    """Rows begins[e] .. begins[e + 1] times w[e] [N, K]. GATHER: row i is x[order[i] // TOP] and the results are gated pairs
    (w [2N, K]); else row i is x[i] and the result, times the routing weight, goes to out[order[i]]."""
    tile = tl.program_id(0)
    e = tl.arange(0, EP)
    first = tl.load(begins + e, mask=e < E, other=0)
    count = tl.load(begins + e + 1, mask=e < E, other=0) - first
    tiles = tl.cdiv(count, BM)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    if expert < E:
        here = e == expert
        begin = tl.sum(tl.where(here, first, 0), 0)
        end = begin + tl.sum(tl.where(here, count, 0), 0)
        i = begin + (tile - tl.sum(tl.where(here, last - tiles, 0), 0)) * BM + tl.arange(0, BM)
        ok = i < end
        pair = tl.load(order + i, mask=ok, other=0).to(tl.int64)
        source = pair // TOP if GATHER else i.to(tl.int64)
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        wide = 2 * N if GATHER else N
        line = w + (expert.to(tl.int64) * wide + tl.minimum(n, N - 1)) * K
        acc = tl.zeros([BM, BN], tl.float32)
        acc2 = tl.zeros([BM, BN], tl.float32)
        for start in range(0, K, BK):
            k = start + tl.arange(0, BK)
            mask = ok[:, None] if EVEN else ok[:, None] & (k < K)[None, :]
            inside = (n < N)[None, :] if EVEN else (n < N)[None, :] & (k < K)[:, None]
            a = tl.load(x + source[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
            b = tl.load(line[None, :] + k[:, None], mask=inside, other=0.0)
            if IEEE:
                acc = tl.dot(a, b, acc, input_precision="ieee")
            else:
                acc = tl.dot(a, b, acc)
            if GATHER:
                c = tl.load(line[None, :] + N.to(tl.int64) * K + k[:, None], mask=inside, other=0.0)
                if IEEE:
                    acc2 = tl.dot(a, c, acc2, input_precision="ieee")
                else:
                    acc2 = tl.dot(a, c, acc2)
        kind = out.dtype.element_ty
        if GATHER:
            acted = activate(acc.to(kind).to(tl.float32), GATE).to(kind).to(tl.float32)
            acc = acted * acc2.to(kind).to(tl.float32)
            to = i.to(tl.int64)
        else:
            acc = acc.to(kind).to(tl.float32) * tl.load(weights + pair, mask=ok, other=0.0)[:, None]
            to = pair
        tl.store(out + to[:, None] * N + n[None, :], acc.to(kind), mask=ok[:, None] & (n < N)[None, :])


@triton.jit
def _sum_experts(pairs, out, H, TOP: tl.constexpr, TP: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = the sum of a token's TOP results [T * TOP, H], in float32."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rank = tl.arange(0, TP)
    mask = (rank < TOP)[:, None] & (column < H)[None, :]
    x = tl.load(pairs + (token * TOP + rank)[:, None] * H + column[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * H + column, tl.sum(x, 0).to(out.dtype.element_ty), mask=column < H)


@triton.jit
def _weigh(made, order, weights, out, H, BLOCK: tl.constexpr):
    """out[order[i]] = made[i] times its routing weight."""
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(order + i)
    x = tl.load(made + i * H + column, mask=column < H, other=0.0).to(tl.float32) * tl.load(weights + pair)
    tl.store(out + pair * H + column, x.to(out.dtype.element_ty), mask=column < H)


# ---- launches ----------------------------------------------------------------------------------------------------


def route(logits: torch.Tensor, top_k: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Router logits [T, E] → weights float32 and experts int32, both [T, top_k]."""
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    if tokens:
        sizes = {"EP": triton.next_power_of_2(experts), "TP": triton.next_power_of_2(top_k)}
        _route[(tokens,)](
            logits, weights, chosen, experts, logits.stride(0), TOP=top_k, **sizes, RENORMALISE=renormalise, num_warps=1
        )
    return weights, chosen


def group_rows(experts: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """experts [T, k] → (order int64 [T * k], the pairs by expert; begins int32 [E + 1], where each expert's are)."""
    ordered, order = experts.flatten().sort(stable=True)
    bounds = torch.arange(num_experts + 1, dtype=ordered.dtype, device=ordered.device)
    return order, torch.searchsorted(ordered, bounds, out_int32=True)


def experts_mlp(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor, kind: int
) -> torch.Tensor:
    """x [T, H] through its experts [T, k] with weights float32 [T, k]; gate_up [E, 2F, H], down [E, H, F] → [T, H]."""
    tokens, hidden = x.shape
    count, _, inner = down.shape
    if not tokens:
        return torch.empty_like(x)
    top = experts.shape[1]
    pairs = tokens * top
    order, begins = group_rows(experts, count)
    wide = x.dtype == torch.float32
    bm = max(16, min(64, triton.next_power_of_2(triton.cdiv(pairs, count))))
    bn, bk = (64, 32) if wide else (64, 128) if bm <= 16 else (64, 64)
    grid = triton.cdiv(pairs, bm) + min(count, pairs)
    shared = {
        "TOP": top, "EP": triton.next_power_of_2(count), "BM": bm, "BN": bn, "BK": bk, "IEEE": wide,
        "num_warps": 4, "num_stages": 2 if wide else 3, "GATE": kind,
    }  # fmt: skip
    inside = torch.empty(pairs, inner, dtype=x.dtype, device=x.device)
    _grouped[(grid, triton.cdiv(inner, bn))](
        x,
        gate_up,
        order,
        begins,
        weights,
        inside,
        inner,
        hidden,
        count,
        x.stride(0),
        EVEN=hidden % bk == 0,
        GATHER=True,
        **shared,
    )
    made = torch.empty(pairs, hidden, dtype=x.dtype, device=x.device)
    _grouped[(grid, triton.cdiv(hidden, bn))](
        inside, down, order, begins, weights, made, hidden, inner, count, inner, EVEN=inner % bk == 0, GATHER=False, **shared
    )
    return _summed(made, tokens, top)


def experts_mlp_by(
    multiply: Multiply, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor,
    kind: int,
) -> torch.Tensor:  # fmt: skip
    """As `experts_mlp`, with the products of somebody else; T > 0."""
    order, begins = group_rows(experts, len(down))
    top, hidden = experts.shape[1], x.shape[1]
    inside = act_mul(multiply(x[order // top], gate_up, begins[1:]), kind)
    made = multiply(inside, down, begins[1:]).contiguous()
    pairs = torch.empty_like(made)
    _weigh[(len(order), triton.cdiv(hidden, 1024))](made, order, weights, pairs, hidden, BLOCK=1024, num_warps=4)
    return _summed(pairs, len(x), top)


def _summed(pairs: torch.Tensor, tokens: int, top: int) -> torch.Tensor:
    hidden = pairs.shape[1]
    out = torch.empty(tokens, hidden, dtype=pairs.dtype, device=pairs.device)
    _sum_experts[(tokens, triton.cdiv(hidden, 1024))](
        pairs, out, hidden, TOP=top, TP=triton.next_power_of_2(top), BLOCK=1024, num_warps=4
    )
    return out
