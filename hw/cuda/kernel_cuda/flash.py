"""Attention of whole prompts to themselves by the flash kernel that torch ships: about twice as fast as ours over pages."""

from __future__ import annotations

import logging
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

logger = logging.getLogger("kernel_cuda")


def attend(q: Tensor, k: Tensor, v: Tensor, q_start: Tensor, max_q: int, scale: float, window: int | None) -> Tensor:
    """Causal, row by row: q [T, Hq, D], k and v [T, Hkv, D], rows as in q_start int32 [R + 1], bf16 or fp16 → [T, Hq, D]."""
    left = None if window is None else window - 1
    right = None if window is None else 0
    return torch.ops.aten._flash_attention_forward(
        q, k, v, q_start, q_start, max_q, max_q, 0.0, True, False, scale=scale, window_size_left=left, window_size_right=right
    )[0]


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Does this torch's kernel take fewer KV heads than query heads and windows, and compute what attention is? Rate: build."""
    draw = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(48, heads, 64, device=device, generator=draw).to(dtype) for heads in (4, 2, 2))
    starts = torch.tensor([0, 16, 48], dtype=torch.int32, device=device)
    for window in (None, 8):
        try:
            got = attend(q, k, v, starts, 32, 0.125, window)
        except (RuntimeError, TypeError, AttributeError) as error:
            logger.warning("prompts run without torch's flash attention: %s", error)
            return False
        if (got.float() - _written_out(q, k, v, (0, 16, 48), window)).abs().max() > 0.05:
            logger.warning("prompts run without torch's flash attention: it computes something else for window %s", window)
            return False
    return True


def _written_out(q: Tensor, k: Tensor, v: Tensor, starts: tuple[int, ...], window: int | None) -> Tensor:
    parts = []
    for begin, end in pairwise(starts):
        keys, values = (x[begin:end].float().repeat_interleave(2, 1).transpose(0, 1) for x in (k, v))
        ago = torch.arange(end - begin, device=q.device)[:, None] - torch.arange(end - begin, device=q.device)
        seen = (ago >= 0) & (ago < (window or end))
        scores = (q[begin:end].float().transpose(0, 1) @ keys.transpose(1, 2) * 0.125).masked_fill(~seen, float("-inf"))
        parts.append((scores.softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts)
