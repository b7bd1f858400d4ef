"""One workload on one engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from kernel_bench.processes import LoadMeter
from kernel_bench.workloads import Workload
from kernel_core.api import Engine, KernelError, RequestError, RequestOutput, SamplingParams


def measure(engine: Engine, workload: Workload, seed: int = 0) -> dict[str, Any]:
    """Run all requests to their full length, greedy, and say how it went: seconds, tokens a second, cores."""
    requests = workload.make(engine.core.report.vocab_size, seed)
    longest = max(len(ids) + new for ids, new in requests)
    if longest > engine.max_model_len:
        raise RequestError(f"the workload needs {longest} tokens a request, max_model_len is {engine.max_model_len}: use --quick")
    meter, start = LoadMeter(), time.monotonic()
    for i, (ids, new) in enumerate(requests):
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        engine.add_request(str(i), ids, params)
    outputs = _finish(engine)
    seconds, load = time.monotonic() - start, meter.read()
    return {
        "requests": len(requests),
        "seconds": round(seconds, 4),
        **_rates(outputs, seconds),
        **_latencies(outputs),
        "own_cores": load.own,
        "foreign_cores": load.foreign,
    }


def _finish(engine: Engine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished_requests():
        outputs += [tracked.output for tracked in engine.advance() if tracked.output.finished]
    failed = next((output.error for output in outputs if output.error), None)
    if failed is not None:
        raise KernelError(f"a request of the workload failed: {failed}")
    return outputs


def _rates(outputs: Sequence[RequestOutput], seconds: float) -> dict[str, float]:
    new = sum(len(output.outputs[0].token_ids) for output in outputs)
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    return {
        "prompt_tokens": prompt,
        "output_tokens": new,
        "output_tokens_per_s": round(new / seconds, 2),
        "total_tokens_per_s": round((new + prompt) / seconds, 2),
    }


def _latencies(outputs: Sequence[RequestOutput]) -> dict[str, float]:
    """Time to first token, and time per token after it, of the requests."""
    timed = [(o.timings.first_token or 0.0, o.timings.finished or 0.0, len(o.outputs[0].token_ids)) for o in outputs]
    first = [ttft for ttft, _, _ in timed]
    each = [(end - ttft) / (count - 1) for ttft, end, count in timed if count > 1]
    return {
        "ttft_mean_s": round(mean(first), 4),
        "ttft_median_s": round(median(first), 4),
        "ttft_max_s": round(max(first), 4),
        "tpot_median_s": round(median(each), 5) if each else 0.0,
    }
