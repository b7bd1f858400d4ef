"""Ours against other engines on the CPU: the same random-weight checkpoint, the same workloads, in turn, each in its own process.

    python tests/benchmarks/cpu_peers.py            # Qwen2.5-0.5B's shape in bf16; ratios, and build/bench/cpu.json
    python tests/benchmarks/cpu_peers.py --quick    # a tiny shape and a tenth of the work: does it run?

Peers are measured when their environment exists: build/bench-envs/NAME/bin/python (transformers: also the one that runs this).
Every run records how many cores were busy with something else; disturbed runs are repeated. The floor of one stream's decode is a
plain read of the weights by as many threads, before and after every engine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"
sys.path.insert(0, str(Path(__file__).parent))

ENGINES = {  # name → where its environment is, and which of its workloads make sense
    "ours": (None, ("a", "b", "c", "b-busy")),
    "transformers": (None, ("a", "b", "c")),
    "transformers-continuous": (None, ("a", "b", "c")),
    "vllm": ("vllm", ("a", "b", "c", "b-busy")),
    "llama-cpp": ("llama-cpp", ("a",)),
}
DISTURBED = 0.25  # foreign cores
ATTEMPTS = 3
QUICK = 0.1
SHAPES = {
    "full": dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864)
    | dict(vocab_size=151936),
    "quick": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128)
    | dict(vocab_size=512),
}


def make_checkpoint(name: str) -> Path:
    """A random-weight Qwen2 checkpoint in bf16, made once."""
    folder = BUILD / f"qwen2-{name}"
    if (folder / "model.safetensors").exists():
        return folder
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    print(f"making {folder}", file=sys.stderr)
    torch.manual_seed(0)
    extra = dict(tie_word_embeddings=True, max_position_embeddings=4096, rope_theta=1e6, bos_token_id=None, eos_token_id=0)
    Qwen2ForCausalLM(Qwen2Config(**SHAPES[name], **extra)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def python_of(engine: str) -> str | None:
    """The interpreter of an engine's environment; None: there is none."""
    folder = ENGINES[engine][0]
    if folder is None:
        return sys.executable
    path = ROOT / "build" / "bench-envs" / folder / "bin" / "python"
    return str(path) if path.exists() else None


def run_engine(engine: str, python: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start the engine's own process; it measures all its workloads and prints one JSON object."""
    names = [name for name in ENGINES[engine][1] if name in arguments.workloads]
    command = [python, str(Path(__file__).with_name("cpu_engine.py")), engine, str(folder), ",".join(names)]
    command += [str(arguments.threads), str(QUICK if arguments.quick else 1.0), str(DISTURBED), str(ATTEMPTS)]
    subprocess.run([python, "-c", "import torch, transformers"], check=False, capture_output=True)  # compiled once, before
    start = time.monotonic()
    errors = None if arguments.verbose else subprocess.PIPE
    try:
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=errors, text=True, timeout=arguments.limit)
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {arguments.limit:.0f} s (--limit)"}
    if done.returncode:
        lines = (done.stderr or "").strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    found = [line for line in done.stdout.splitlines() if line.startswith("{")]  # some engines write more when they end
    return {**json.loads(found[-1]), "process_seconds": round(time.monotonic() - start, 2)}


def plain_reads(bytes_: int, threads: int, times: int = 5) -> list[float]:
    """Seconds that reading so many bytes of memory takes."""
    import cpu_kernels

    cpu_kernels.threads.set_num_threads(threads)
    read = cpu_kernels.reader()
    return [seconds for _ in range(times) for seconds in cpu_kernels.medians(1, lambda: read(bytes_))]


def single_stream(results: dict[str, dict[str, Any]], floor: float) -> list[str]:
    """Decoding alone, workload (a): tokens a second after the first, and how far from the floor."""
    lines = [f"a plain read of the weights takes {floor * 1e3:.1f} ms: at most {1 / floor:.1f} tokens/s of decode in (a)"]
    for engine, result in results.items():
        found = result.get("workloads", {}).get("a")
        if found and found["ttft_mean_s"]:
            speed = (found["output_tokens"] - 1) / (found["seconds"] - found["ttft_mean_s"])
            share = f"{speed * floor:.0%} of the floor, first token after {found['ttft_mean_s'] * 1e3:.0f} ms"
            lines.append(f"  {engine}: {speed:.1f} tokens/s, {share}")
    return lines


def table(results: dict[str, dict[str, Any]], workloads: list[str]) -> str:
    """Tokens a second and, in brackets, ours divided by theirs."""
    ours = results.get("ours", {}).get("workloads", {})
    head = ["engine", *workloads, "start s", "peak MiB"]
    rows = [head]
    for engine, result in results.items():
        if "error" in result:
            rows.append([engine, f"failed: {result['error']}"])
            continue
        cells = []
        for name in workloads:
            found = result["workloads"].get(name)
            speed = found and found["output_tokens_per_s"]
            own = ours.get(name, {}).get("output_tokens_per_s")
            ratio = f" ({own / speed:.2f}x)" if speed and own and engine != "ours" else ""
            disturbed = "*" if found and found["foreign_cores"] > DISTURBED and name != "b-busy" else ""
            cells.append(f"{speed:.1f}{disturbed}{ratio}" if speed else "-")
        rows.append([engine, *cells, f"{result['start_seconds']:.1f}", f"{result['peak_memory_bytes'] / 2**20:.0f}"])
    widths = [max(len(row[i]) for row in rows if len(row) > i and len(row) > 2) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)) if len(row) > 2 else "  ".join(row) for row in rows]
    return "\n".join([*lines, "", "tokens a second; (ours / theirs); * other programs took more than a quarter of a core"])


def write(out: Path, results: dict[str, Any], reads: list[float], size: int, arguments: argparse.Namespace) -> None:
    """What is measured so far."""
    facts = {"threads": arguments.threads, "quick": arguments.quick, "plain_read_seconds": statistics.median(reads)}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({**facts, "weight_bytes": size, "cpu": cpu_name(), "engines": results}, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape and a tenth of the work")
    parser.add_argument("--engines", default=",".join(ENGINES), help="comma-separated; default all")
    parser.add_argument("--workloads", default="a,b,c,b-busy", help="comma-separated; b-busy is b beside one busy core")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores available")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that one engine may take (3600)")
    parser.add_argument("--verbose", action="store_true", help="show what the engines say")
    parser.add_argument("--out", type=Path, default=BUILD / "cpu.json")
    arguments = parser.parse_args()
    arguments.workloads = arguments.workloads.split(",")
    folder = make_checkpoint("quick" if arguments.quick else "full")
    results: dict[str, dict[str, Any]] = {}
    size = (folder / "model.safetensors").stat().st_size
    reads = plain_reads(size, arguments.threads)
    for engine in arguments.engines.split(","):
        python = python_of(engine)
        if python is None:
            print(f"{engine}: not installed (make bench-peers installs it)", file=sys.stderr)
            continue
        print(f"{engine}: running ...", file=sys.stderr)
        results[engine] = run_engine(engine, python, folder, arguments)
        reads += plain_reads(size, arguments.threads)
        write(arguments.out, results, reads, size, arguments)
    floor = statistics.median(reads)
    print(table(results, arguments.workloads))
    print("\n".join(single_stream(results, floor)))
    print(f"written to {arguments.out}")
    return 1 if "error" in results.get("ours", {}) else 0


if __name__ == "__main__":
    sys.exit(main())
