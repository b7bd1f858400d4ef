"""How fast a run was, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from kernel_core.api import RequestOutput


def describe(outputs: Sequence[RequestOutput], start_seconds: float) -> str:
    """Tokens a second over the whole run, and the median time to first token."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    ends = [output.timings.arrival + output.timings.finished for output in outputs if output.timings.finished is not None]
    seconds = max(ends) - min(output.timings.arrival for output in outputs)
    first = [output.timings.first_token for output in outputs if output.timings.first_token is not None]
    ttft = f"{median(first) * 1e3:.0f} ms" if first else "none"
    return (
        f"{len(outputs)} prompt{'s' * (len(outputs) > 1)}, {prompt} tokens in, {tokens} out in {seconds:.2f} s:"
        f" {tokens / max(seconds, 1e-9):.1f} tokens/s, time to first token {ttft} (median), start {start_seconds:.1f} s"
    )
