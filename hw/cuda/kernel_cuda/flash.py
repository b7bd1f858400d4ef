"""Attention over keys that lie one after another, by the flash kernel that torch ships: up to twice as fast as ours on pages."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

logger = logging.getLogger("kernel_cuda")

#: (q, k, v, q_start, k_start, max_q, max_k, scale, window) → out, as `attend`
Flash = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, int | None], Tensor]


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_start: Tensor, k_start: Tensor, max_q: int, max_k: int, scale: float, window: int | None
) -> Tensor:
    """Causal, row by row: q [T, Hq, D], k and v [N, Hkv, D], bf16 or fp16, a row's as in q_start and k_start int32 [R + 1], the
    last query at the last key → [T, Hq, D]. Queries without keys get anything. `max_q` and `max_k`: bounds of the others."""
    left = None if window is None else window - 1
    right = None if window is None else 0
    return torch.ops.aten._flash_attention_forward(
        q, k, v, q_start, k_start, max_q, max_k, 0.0, True, False, scale=scale, window_size_left=left, window_size_right=right
    )[0]


#: starts of queries and of keys; False: whole prompts, True: one, queries without keys, and two with KV before them
ROWS = {False: ((0, 16, 48), (0, 16, 48)), True: ((0, 16, 23, 40, 48), (0, 16, 16, 57, 90))}


@cache
def works(device: torch.device, dtype: torch.dtype, mixed: bool) -> bool:
    """Does this torch's kernel take fewer KV heads than query heads, windows, and when `mixed` fewer queries than keys and rows
    without keys, and compute what attention is? Rate: build."""
    queries, keys = ROWS[mixed]
    draw = torch.Generator(device).manual_seed(0)
    q = torch.randn(queries[-1], 4, 64, device=device, generator=draw).to(dtype)
    k, v = (torch.randn(keys[-1], 2, 64, device=device, generator=draw).to(dtype) for _ in range(2))
    q_start, k_start = (torch.tensor(starts, dtype=torch.int32, device=device) for starts in (queries, keys))
    for window in (None, 8):
        try:
            got = attend(q, k, v, q_start, k_start, 32, 64, 0.125, window)
        except (RuntimeError, TypeError, AttributeError) as error:
            logger.warning("prompts run without torch's flash attention: %s", error)
            return False
        if not _alike(got, q, k, v, window, queries, keys):
            logger.warning("prompts run without torch's flash attention: it computes something else for window %s", window)
            return False
    return True


def _alike(got: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int | None, queries: Sequence[int], keys: Sequence[int]) -> bool:
    for (begin, end), (first, last) in zip(pairwise(queries), pairwise(keys), strict=True):
        if first == last:
            continue
        wanted = _written_out(q[begin:end], k[first:last], v[first:last], window)
        if not (got[begin:end].float() - wanted).abs().max() <= 0.05:
            return False
    return True


def _written_out(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    keys, values = (x.float().repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
    at = torch.arange(len(k), device=q.device)
    ago = at[len(k) - len(q) :, None] - at
    seen = (ago >= 0) & (ago < (window or len(k)))
    scores = (q.float().transpose(0, 1) @ keys.transpose(1, 2) * 0.125).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ values).transpose(0, 1)
