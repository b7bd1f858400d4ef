"""What the largest steps take, run before KV is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from kernel_core.api import Allocation, CapacityError, Opened, SamplingRow, StepPlan
from kernel_core.nn.api import AttentionSpec

CONTEXT = 4096  # computed tokens that a row has before the step, where it may be that long
ASKED = SamplingRow(temperature=1.0, top_k=1000, top_p=0.9, min_p=0.01, logprobs=20)


def largest_step(sizes: Allocation, tokens: int, vocab_size: int) -> StepPlan:
    """A step of at most `tokens` tokens: as many requests as fit, each sampled with all filters, logprobs and drafts; the
    first ones have what is left of the tokens. All their KV lies in the null block."""
    each = min(1 + sizes.draft_width, tokens)
    rows = np.arange(max(1, min(sizes.max_slots, tokens // each)), dtype=np.int32)
    longest = max(sizes.max_model_len - each, 0)
    q = (each + np.clip(tokens - each * len(rows) - rows * longest, 0, longest)).astype(np.int32)
    start = np.clip(sizes.max_model_len - q, 0, CONTEXT).astype(np.int32)
    known = start + q - (each - 1)
    asked = replace(ASKED, logprobs=min(ASKED.logprobs, vocab_size))
    opened = tuple(
        Opened(row, f"trial {row}", np.zeros(count, np.int32), begin, row, replace(asked, num_prompt_tokens=count))
        for row, count, begin in zip(rows.tolist(), known.tolist(), start.tolist())
    )
    return StepPlan(0, rows, start, q, np.full_like(q, each), start, np.zeros_like(q), opened)


def run(make_runner: Callable[[], Any], sizes: Allocation, tokens: int) -> list[AttentionSpec]:
    """Run `largest_step` on a new runner → its attention layers. Raises CapacityError."""
    try:
        runner = make_runner()
        plan = largest_step(sizes, tokens, runner.vocab_size)
        pending = runner.submit(plan)
        runner.submit(StepPlan(1, *(plan.rows[:0],) * 6, closed=plan.rows))
    except torch.OutOfMemoryError as error:
        raise _too_large(tokens, sizes.max_slots) from error
    if pending.oversized:
        raise _too_large(int(plan.q.sum()), len(plan.rows))
    return list(runner.kv.specs.values())


def _too_large(tokens: int, rows: int) -> CapacityError:
    return CapacityError(
        f"a step of {tokens} tokens and {rows} requests does not fit beside the weights; lower engine.max_tokens_per_step or "
        "engine.max_requests, or use a GPU with more free memory"
    )
