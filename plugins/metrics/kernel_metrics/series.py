"""What is measured, as data: names, help, buckets, and the names that other servers' dashboards expect."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kernel_metrics.records import Sample

PREFIX, COMPATIBLE = "kernel:", "vllm:"
Kind = Literal["counter", "gauge", "histogram"]

_FAST = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0)
_LONG = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0)
_STEP = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_TOKENS = tuple(float(m * 10**e) for e in range(7) for m in (1, 2, 5))
_STEP_TOKENS = tuple(float(2**e) for e in range(15))
_CHOICES = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0)


@dataclass(frozen=True, slots=True)
class Series:
    """`also`: further names under the compatible prefix; "" stands for its own."""

    kind: Kind
    help: str
    buckets: tuple[float, ...] = ()
    also: tuple[str, ...] = ()


SERIES: dict[str, Series] = {
    "num_requests_running": Series("gauge", "Sequences that own a slot", also=("",)),
    "num_requests_waiting": Series("gauge", "Sequences that own none: queued, gated or preempted", also=("",)),
    "kv_cache_usage_perc": Series("gauge", "Share of the KV blocks in use; 1 is all", also=("", "gpu_cache_usage_perc")),
    "kv_blocks": Series("gauge", "KV blocks of each group"),
    "kv_blocks_free": Series("gauge", "KV blocks of each group that may be taken, kept prefixes included"),
    "prefix_cache_queries": Series("counter", "Tokens of prompts that were looked up", also=("", "gpu_prefix_cache_queries")),
    "prefix_cache_hits": Series("counter", "Of those, tokens whose KV was there", also=("", "gpu_prefix_cache_hits")),
    "num_preemptions": Series("counter", "Sequences that lost their blocks and were computed again", also=("",)),
    "prompt_tokens": Series("counter", "Prompt tokens of sequences that got their first token", also=("",)),
    "prompt_tokens_by_source": Series("counter", "The same by where their KV came from", also=("",)),
    "generation_tokens": Series("counter", "Tokens generated", also=("",)),
    "request_success": Series("counter", "Sequences that ended, by reason", also=("",)),
    "engine_steps": Series("counter", "Steps of the engine"),
    "spec_decode_num_drafts": Series("counter", "Times that drafts of a sequence were verified", also=("",)),
    "spec_decode_num_draft_tokens": Series("counter", "Draft tokens that were verified", also=("",)),
    "spec_decode_num_accepted_tokens": Series("counter", "Of those, accepted", also=("",)),
    "spec_decode_num_accepted_tokens_per_pos": Series("counter", "Accepted draft tokens by position", also=("",)),
    "iteration_tokens_total": Series("histogram", "Tokens computed in a step, drafts included", _STEP_TOKENS, ("",)),
    "step_time_seconds": Series("histogram", "From the plan of a step to its commit", _STEP),
    "time_to_first_token_seconds": Series("histogram", "From arrival to the first token", _FIRST, ("",)),
    "inter_token_latency_seconds": Series(
        "histogram", "Between two tokens of a sequence", _FAST, ("", "time_per_output_token_seconds")
    ),
    "request_time_per_output_token_seconds": Series("histogram", "Mean time of a token after the first", _FAST, ("",)),
    "e2e_request_latency_seconds": Series("histogram", "From arrival to the end", _LONG, ("",)),
    "request_queue_time_seconds": Series("histogram", "From arrival to the first step", _LONG, ("",)),
    "request_inference_time_seconds": Series("histogram", "From the first step to the last token", _LONG, ("",)),
    "request_prefill_time_seconds": Series("histogram", "From the first step to the first token", _LONG, ("",)),
    "request_decode_time_seconds": Series("histogram", "From the first token to the last", _LONG, ("",)),
    "request_prompt_tokens": Series("histogram", "Prompt tokens of a sequence", _TOKENS, ("",)),
    "request_generation_tokens": Series("histogram", "Generated tokens of a sequence", _TOKENS, ("",)),
    "request_max_num_generation_tokens": Series("histogram", "Generated tokens of a request's longest choice", _TOKENS, ("",)),
    "request_params_n": Series("histogram", "Choices of a request", _CHOICES, ("",)),
    "request_params_max_tokens": Series("histogram", "The most tokens that a sequence may generate", _TOKENS, ("",)),
    "http_requests": Series("counter", "HTTP requests by route and status; 0: the client went first"),
    "http_request_seconds": Series("histogram", "From an HTTP request to the end of its answer", _LONG),
}
HTTP_SECONDS = SERIES["http_request_seconds"].buckets


def names(sample: Sample, compatible: bool) -> list[str]:
    """Every name under which a sample is exported, its own first."""
    others = SERIES[sample.name].also if compatible else ()
    return [PREFIX + sample.name, *(COMPATIBLE + (other or sample.name) for other in others)]
