"""How fast a run was, in one line."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from kernel_core.api import DraftCounts, RequestOutput


def describe(outputs: Sequence[RequestOutput], start_seconds: float, drafts: DraftCounts) -> str:
    """Tokens a second over the whole run, the median time to first token, what a cache and drafts saved."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    ends = [output.timings.arrival + output.timings.finished for output in outputs if output.timings.finished is not None]
    seconds = max(ends) - min(output.timings.arrival for output in outputs)
    first = [output.timings.first_token for output in outputs if output.timings.first_token is not None]
    ttft = f"{median(first) * 1e3:.0f} ms" if first else "none"
    cached = sum(output.num_cached_tokens or 0 for output in outputs)
    return (
        f"{len(outputs)} prompt{'s' * (len(outputs) > 1)}, {prompt} tokens in, {tokens} out in {seconds:.2f} s:"
        f" {tokens / max(seconds, 1e-9):.1f} tokens/s, time to first token {ttft} (median), start {start_seconds:.1f} s"
        + (f", {cached} of the tokens in were cached" if cached else "")
        + (f"\n{_speculation(drafts)}" if drafts.steps else "")
    )


def _speculation(drafts: DraftCounts) -> str:
    places = ", ".join(f"{count / drafts.steps:.0%}" for count in drafts.by_place)
    return (
        f"drafts: {drafts.accepted} of {drafts.drafted} accepted in {drafts.steps} verifications,"
        f" {drafts.mean_length:.2f} tokens each; accepted by place {places or 'none'}"
    )
