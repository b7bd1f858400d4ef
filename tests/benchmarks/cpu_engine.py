"""One engine in this process: `cpu_engine.py ENGINE FOLDER WORKLOADS THREADS SCALE DISTURBED ATTEMPTS` → one JSON line.
Runs in the environments of the other engines too, so only the standard library is imported before the engine itself."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Requests = list[tuple[list[int], int]]  # (prompt token ids, new tokens)
MAX_LEN = 1024


def _module(name: str) -> Any:
    path = ROOT / "plugins" / "bench" / "kernel_bench" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"bench_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


workloads, processes = _module("workloads"), _module("processes")


def ours(folder: Path, threads: int) -> Callable[[Requests], float | None]:
    from kernel_core import Engine, SamplingParams

    only = {"profile": "none", "plugins": {"safetensors": {}, "prefix_caching": {}}}  # token ids in, token ids out
    engine = Engine(model=str(folder), device="cpu", threads=threads, max_model_len=MAX_LEN, **only)
    print(engine.summary, file=sys.stderr)

    def run(requests: Requests) -> float | None:
        for i, (ids, new) in enumerate(requests):
            engine.add_request(str(i), ids, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False))
        first = []
        while engine.has_unfinished_requests():
            first += [t.output.timings.first_token for t in engine.advance() if t.output.finished]
        return sum(first) / len(first)

    return run


def _transformers(folder: Path, threads: int, **options: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **options).eval()


def transformers(folder: Path, threads: int) -> Callable[[Requests], float | None]:
    """One padded batch; it runs as long as its longest member, and only the tokens asked for are counted."""
    import torch

    model = _transformers(folder, threads)

    def generate(requests: Requests, new: int) -> None:
        width = max(len(ids) for ids, _ in requests)
        rows = [[0] * (width - len(ids)) + ids for ids, _ in requests]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in requests]
        model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
        )

    def run(requests: Requests) -> float | None:
        generate(requests, max(new for _, new in requests))
        return None

    return run


def transformers_continuous(folder: Path, threads: int) -> Callable[[Requests], float | None]:
    from transformers import GenerationConfig

    model = _transformers(folder, threads)

    def run(requests: Requests) -> float | None:
        config = GenerationConfig(
            do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(new for _, new in requests)
        )
        model.generate_batch(inputs=[ids for ids, _ in requests], generation_config=config, progress_bar=False)
        return None

    return run


def vllm(folder: Path, threads: int) -> Callable[[Requests], float | None]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])))
    from vllm import LLM, SamplingParams

    llm = LLM(str(folder), skip_tokenizer_init=True, dtype="bfloat16", max_model_len=MAX_LEN, disable_log_stats=False)

    def run(requests: Requests) -> float | None:
        params = [SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in requests]
        outputs = llm.generate([{"prompt_token_ids": ids} for ids, _ in requests], params, use_tqdm=False)
        first = [getattr(output.metrics, "first_token_latency", None) for output in outputs]
        return sum(first) / len(first) if all(first) else None

    return run


def llama_cpp(folder: Path, threads: int) -> Callable[[Requests], float | None]:
    from llama_cpp import Llama

    file = folder.with_suffix(".gguf")
    if not file.exists():
        from gguf_checkpoint import convert

        convert(folder, file)
    model = Llama(str(file), n_ctx=MAX_LEN, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(requests: Requests) -> float | None:
        first = []
        for ids, new in requests:
            start, stream = time.monotonic(), model.generate(ids, temp=0.0, reset=True)
            next(stream)
            first.append(time.monotonic() - start)
            for _ in range(new - 1):
                next(stream)
        return sum(first) / len(first)

    return run


ENGINES = {
    "ours": ours,
    "transformers": transformers,
    "transformers-continuous": transformers_continuous,
    "vllm": vllm,
    "llama-cpp": llama_cpp,
}


@contextlib.contextmanager
def busy_core(wanted: bool) -> Iterator[None]:
    """Another process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if wanted else None
    try:
        yield
    finally:
        if process is not None:
            process.kill()
            process.wait()


def once(run: Callable[[Requests], float | None], requests: Requests, counted: Requests, busy: bool) -> dict[str, Any]:
    with busy_core(busy):
        meter, start = processes.LoadMeter(), time.monotonic()
        first = run(requests)
        seconds, load = time.monotonic() - start, meter.read()
    tokens = sum(new for _, new in counted)
    return {
        "seconds": round(seconds, 3),
        "output_tokens": tokens,
        "output_tokens_per_s": round(tokens / seconds, 2),
        "ttft_mean_s": first if first is None else round(first, 4),
        "own_cores": load.own,
        "foreign_cores": load.foreign,
    }


def measure(
    run: Callable[[Requests], float | None], name: str, scale: float, vocab: int, disturbed: float, attempts: int
) -> dict[str, Any]:
    """The least disturbed of a few attempts; the first undisturbed one ends them."""
    base, _, busy = name.partition("-")
    workload = workloads.WORKLOADS[base]
    workload = workload if scale == 1 else workload.scaled(scale)
    runs = []
    for attempt in range(attempts):  # with new tokens each time: nothing is found in a cache
        requests = workload.make(vocab, seed=2 * attempt + bool(busy))
        runs.append(once(run, requests, requests, bool(busy)))
        if runs[-1]["foreign_cores"] <= disturbed:
            break
    best = min(runs, key=lambda result: result["foreign_cores"])
    if best["ttft_mean_s"] is None:
        best["ttft_mean_s"] = once(run, [(ids, 1) for ids, _ in requests], requests, bool(busy))["seconds"]
    return {**best, "attempts": len(runs)}


def main() -> None:
    engine, folder, names, threads, scale, disturbed, attempts = sys.argv[1:]
    vocab = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    with contextlib.redirect_stdout(sys.stderr):
        start = time.monotonic()
        run = ENGINES[engine](Path(folder), int(threads))
        started = time.monotonic() - start
        run([(ids, 4) for ids, _ in replace(workloads.WORKLOADS["b"].scaled(0.05)).make(vocab)])  # warm
        results = {n: measure(run, n, float(scale), vocab, float(disturbed), int(attempts)) for n in names.split(",") if n}
        peak = processes.peak_memory()
    print(json.dumps({"start_seconds": round(started, 3), "peak_memory_bytes": peak, "workloads": results}))


if __name__ == "__main__":
    main()
