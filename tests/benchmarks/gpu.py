"""Speed on a GPU against the floors of the same run and against transformers: a table, and build/bench/gpu.json.

    python tests/benchmarks/gpu.py                                    # everything, within --seconds (500)
    python tests/benchmarks/gpu.py --models 8b --batches 1,64 --contexts 512 --no-prefill --peers none

Weights are random and made on the GPU. A decode step's floor is the bytes it must read (weights, and KV of every row) over the
bandwidth of a large copy; a prefill's is its arithmetic over the rate of a large bf16 product. Then, as far as there is time,
every kernel alone against its own floor. Needs torch, triton and transformers. Lines are printed as they are measured; a part
that fails says so and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "bench"
STEPS_TRACED = 20
LAST_PART = 35  # seconds beyond --seconds that the kernels may take
KERNELS = "decode,prefill,experts,samples,points,narrow,linears"  # parts of measure_kernels.py
MAX_TOKENS_PER_STEP = 8192


@dataclass(frozen=True)
class Shape:
    """A dense decoder as its config.json states it."""

    kind: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool

    def config(self) -> dict[str, Any]:
        architecture = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[self.kind]
        return {
            "architectures": [architecture],
            "model_type": self.kind,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.ffn,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "max_position_embeddings": 32768,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": 0,
        }

    @property
    def layer_weights(self) -> int:
        """Elements of all layers' products."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    def decode_bytes(self, batch: int, length: float) -> float:
        """What a step reads in bf16: every product's weight, the head's included, and all KV."""
        kv = self.layers * 2 * self.kv_heads * self.head_dim * length * batch
        return 2.0 * (self.layer_weights + self.vocab * self.hidden + kv)

    def prefill_flops(self, prompts: int, length: int) -> float:
        attention = 2 * self.layers * self.heads * self.head_dim * length * length  # causal: half of 4 L^2
        return prompts * (2.0 * self.layer_weights * length + attention + 2.0 * self.vocab * self.hidden)


SHAPES = {
    "0.5b": Shape("qwen2", 896, 24, 14, 2, 64, 4864, 151936, True),
    "1b": Shape("llama", 2048, 16, 32, 8, 64, 8192, 128256, True),
    "8b": Shape("llama", 4096, 32, 32, 8, 128, 14336, 128256, False),
}


def main() -> int:
    arguments = parse()
    began = time.monotonic()
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "lines": []}
    copy, rate = ceilings()
    torch.cuda.empty_cache()
    results |= {"copy_bytes_per_s": copy, "bf16_flops_per_s": rate}
    print(f"{results['gpu']}, torch {torch.__version__}: a copy {copy / 1e12:.2f} TB/s, a bf16 product {rate / 1e12:.0f} TFLOP/s")
    for name in arguments.models:
        if time.monotonic() - began > arguments.seconds:
            print(f"{name}: left out, the time is used up (--seconds)")
            continue
        for line in measured(lambda name=name: model_lines(name, copy, rate, arguments, began)):
            keep(results, line, arguments.out)
    for line in measured(lambda: peer_lines(arguments, began)):
        keep(results, line, arguments.out)
    if arguments.each_kernel:
        for line in measured(lambda: kernel_lines(arguments.seconds + LAST_PART - (time.monotonic() - began))):
            keep(results, line, arguments.out)
    print(f"written to {arguments.out}, {time.monotonic() - began:.0f} s")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda kind: lambda text: [kind(part) for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--models", type=listed(str), default=[*SHAPES], help="of 0.5b,1b,8b")
    parser.add_argument("--batches", type=listed(int), default=[1, 8, 64, 256])
    parser.add_argument("--contexts", type=listed(int), default=[512, 8192])
    parser.add_argument("--steps", type=int, default=64, help="decode steps that are timed (64)")
    parser.add_argument("--seconds", type=float, default=500, help="no new part begins after this time (500)")
    parser.add_argument("--prefill", action=argparse.BooleanOptionalAction, default=True, help="4 prompts of 4096 tokens")
    parser.add_argument(
        "--busy", action=argparse.BooleanOptionalAction, default=True, help="GPU busy in steady decode, batch 256"
    )
    parser.add_argument("--peers", default="generate,continuous", help="transformers at 1b, or none")
    parser.add_argument(
        "--each-kernel", action=argparse.BooleanOptionalAction, default=True, help="every kernel against its own floor"
    )
    parser.add_argument("--kernels", type=int, default=0, help="print this many of the longest kernels of every decode step")
    parser.add_argument(
        "--plugins", default="{}", help='JSON: sections of the engine\'s plugins, as \'{"cuda": {"graphs": false}}\''
    )
    parser.add_argument("--out", type=Path, default=BUILD / "gpu.json")
    return parser.parse_args()


def keep(results: dict[str, Any], line: dict[str, Any], out: Path) -> None:
    results["lines"].append(line)
    print(
        "  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in line.items()),
        flush=True,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1))


def measured(part: Callable[[], Iterator[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The lines of a part, and one more that says why where it failed."""
    try:
        yield from part()
    except Exception as error:
        traceback.print_exc()
        yield {"failed": f"{type(error).__name__}: {error}"}
    torch.cuda.empty_cache()


# ---- floors


def ceilings() -> tuple[float, float]:
    """Bytes a second of a large copy, read and written ones counted, and bf16 operations a second of a large product."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copy = 2 * source.numel() / seconds(partial(target.copy_, source))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return copy, 2 * 8192**3 / seconds(partial(torch.mm, a, b))


def seconds(work: Callable[[], Any], times: int = 7) -> float:
    """Median by device events, after a warm-up."""
    work()
    taken = []
    for _ in range(times):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)


# ---- this engine


def folder(name: str) -> Path:
    """A directory with the shape's config.json and nothing else."""
    path = BUILD / f"gpu-{name}"
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(SHAPES[name].config()))
    return path


@contextmanager
def engine(name: str, arguments: argparse.Namespace) -> Iterator[Any]:
    from kernel_core import Engine

    began = time.monotonic()
    plugins = {"safetensors": {}, **json.loads(arguments.plugins)}
    options = dict(
        dtype="bfloat16", random_weights=True, max_requests=256, max_tokens_per_step=MAX_TOKENS_PER_STEP, max_model_len=16384
    )
    with Engine(model=str(folder(name)), device="cuda", profile="none", plugins=plugins, **options) as opened:
        print(f"{name}: {opened.summary}; started in {time.monotonic() - began:.1f} s", flush=True)
        yield opened


def requests(opened: Any, batch: int, length: int, new: int, vocab: int) -> None:
    from kernel_core import SamplingParams

    for number in range(batch):
        prompt = [random.randrange(100, vocab) for _ in range(length)]
        opened.add_request(f"{number}", prompt, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False))


def decode(opened: Any, batch: int, length: int, steps: int, vocab: int) -> float:
    """Seconds of a step in which every row decodes, once all prompts are computed."""
    warm = 8
    requests(opened, batch, length, steps + warm + 8 + prompt_steps(batch, length), vocab)
    until_all_decode(opened, batch)
    for _ in range(warm):
        opened.advance()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(steps):
        opened.advance()
    torch.cuda.synchronize()
    taken = (time.perf_counter() - begin) / steps
    opened.abort([str(number) for number in range(batch)])
    finish(opened)
    return taken


def prompt_steps(batch: int, length: int) -> int:
    """Steps in which the first rows decode while the last prompts are computed."""
    return batch * length // MAX_TOKENS_PER_STEP + batch // 8 + 2


def until_all_decode(opened: Any, batch: int) -> None:
    started: set[str] = set()
    while len(started) < batch:
        started |= {tracked.output.request_id for tracked in opened.advance() if tracked.output.outputs[0].token_ids}


def finish(opened: Any) -> None:
    while opened.has_unfinished_requests():
        opened.advance()


def model_lines(name: str, copy: float, rate: float, arguments: argparse.Namespace, began: float) -> Iterator[dict[str, Any]]:
    shape = SHAPES[name]
    with engine(name, arguments) as opened:
        for context in arguments.contexts:
            for batch in arguments.batches:
                if time.monotonic() - began > arguments.seconds or too_large(opened, batch, context, arguments.steps):
                    continue
                decode(opened, batch, 32, 2, shape.vocab)  # compiles and captures
                taken = decode(opened, batch, context, arguments.steps, shape.vocab)
                floor = shape.decode_bytes(batch, context + 8 + arguments.steps / 2) / copy
                speed = batch / taken
                yield {
                    "decode": name,
                    "batch": batch,
                    "context": context,
                    "ms": taken * 1e3,
                    "of_floor": floor / taken,
                    "tokens/s": speed,
                }
                if arguments.kernels:
                    print(kernel_table(traced(opened, batch, context, shape.vocab), arguments.kernels), flush=True)
        if arguments.prefill:
            yield prefill(opened, name, rate)
        if arguments.busy:
            yield {"busy": name, "batch": 256, **busy(opened, shape.vocab)}


def too_large(opened: Any, batch: int, context: int, steps: int) -> bool:
    """Do the prompts not fit into KV, or take minutes to compute?"""
    needed = batch * (context + steps + 32)
    allocation = opened.core.allocation
    held = min(allocation.num_blocks) * opened.core.report.groups[0].block_size
    return needed > held or batch * context > 600_000


def prefill(opened: Any, name: str, rate: float, prompts: int = 4, length: int = 4096) -> dict[str, Any]:
    shape, taken = SHAPES[name], []
    for _ in range(4):
        requests(opened, prompts, length, 1, shape.vocab)
        torch.cuda.synchronize()
        begin = time.perf_counter()
        finish(opened)
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    best = statistics.median(taken[1:])
    share = shape.prefill_flops(prompts, length) / rate / best
    return {
        "prefill": name,
        "prompts": f"{prompts} x {length}",
        "ms": best * 1e3,
        "of_rate": share,
        "tokens/s": prompts * length / best,
    }


def traced(opened: Any, batch: int, context: int, vocab: int, steps: int = STEPS_TRACED) -> list[tuple[float, float, str]]:
    """(start, end, name) in microseconds of everything the GPU did in some steady decode steps."""
    from torch.profiler import ProfilerActivity, profile

    requests(opened, batch, context, steps + 40 + prompt_steps(batch, context), vocab)
    until_all_decode(opened, batch)
    for _ in range(8):
        opened.advance()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
        for _ in range(steps):
            opened.advance()
        torch.cuda.synchronize()
    opened.abort([str(number) for number in range(batch)])
    finish(opened)
    events = (e for e in trace.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    return sorted((e.time_range.start, e.time_range.end, e.name) for e in events)


def kernel_table(spans: list[tuple[float, float, str]], most: int) -> str:
    """Microseconds and launches a step, by kernel."""
    total: dict[str, list[float]] = {}
    for start, stop, name in spans:
        total.setdefault(name, []).append(stop - start)
    longest = sorted(total.items(), key=lambda item: -sum(item[1]))[:most]
    lines = [
        f"    {sum(taken) / STEPS_TRACED:8.1f} us  {len(taken) / STEPS_TRACED:6.1f} x  {name[:100]}" for name, taken in longest
    ]
    between = spans[-1][1] - spans[0][0] - sum(stop - start for start, stop, _ in spans)
    return "\n".join([*lines, f"    {between / STEPS_TRACED:8.1f} us  between kernels"])


def busy(opened: Any, vocab: int, batch: int = 256) -> dict[str, float]:
    """The share of a steady decode in which a kernel runs, from a trace."""
    spans = traced(opened, batch, 128, vocab)
    total, end = 0.0, spans[0][0]
    for start, stop, _ in spans:
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return {"share": total / (end - spans[0][0]), "kernels_a_step": len(spans) / STEPS_TRACED}


# ---- transformers


def peer_lines(arguments: argparse.Namespace, began: float) -> Iterator[dict[str, Any]]:
    wanted = [name for name in arguments.peers.split(",") if name in PEERS]
    for peer in wanted:
        for batch in (1, 64):
            if time.monotonic() - began < arguments.seconds:
                yield from measured(lambda peer=peer, batch=batch: iter([PEERS[peer](batch)]))


def transformers_model(name: str, attention: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    config = AutoConfig.from_pretrained(folder(name))
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.pad_token_id = 0
    return model


def peer_generate(batch: int, name: str = "1b", length: int = 512, new: int = 64) -> dict[str, Any]:
    """generate with a static cache, which transformers compiles."""
    model = transformers_model(name, "sdpa")
    ids = torch.randint(100, SHAPES[name].vocab, (batch, length), device="cuda")
    options = dict(attention_mask=torch.ones_like(ids), do_sample=False, cache_implementation="static")

    def run(count: int) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(ids, max_new_tokens=count, min_new_tokens=count, **options)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    run(new + 1), run(new + 1)
    step = (run(new + 1) - run(1)) / new
    return {
        "transformers": "generate, static cache, compiled",
        "model": name,
        "batch": batch,
        "ms": step * 1e3,
        "tokens/s": batch / step,
    }


def peer_continuous(batch: int, name: str = "1b", length: int = 512, new: int = 64) -> dict[str, Any]:
    from transformers import GenerationConfig

    model = transformers_model(name, "paged|sdpa")
    config = GenerationConfig(max_new_tokens=new, eos_token_id=-1, pad_token_id=0, do_sample=False)
    ids = [[random.randrange(100, SHAPES[name].vocab) for _ in range(length)] for _ in range(batch)]

    def run() -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate_batch(inputs=ids, generation_config=config, progress_bar=False)
        return time.perf_counter() - begin

    run()
    taken = run()
    return {
        "transformers": "continuous batching",
        "model": name,
        "batch": batch,
        "seconds": taken,
        "tokens/s": batch * new / taken,
    }


# ---- kernels


def kernel_lines(
    seconds: float, script: Path = ROOT / "tests" / "hw" / "cuda" / "measure_kernels.py"
) -> Iterator[dict[str, Any]]:
    """What measure_kernels.py finds within that time."""
    out = BUILD / "gpu_kernels.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "hw" / "cuda"), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(script), "--only", KERNELS, "--json", str(out)]
    try:
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, timeout=max(seconds, 0.1), check=True)
    except subprocess.TimeoutExpired:
        print("kernels: those that follow are left out, the time is used up (--seconds)")
    except subprocess.CalledProcessError as error:
        print(f"kernels: those that follow are left out, {error}")
    if out.exists():
        yield from json.loads(out.read_text())["rows"]


PEERS = {"generate": peer_generate, "continuous": peer_continuous}


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("this measures a GPU, and torch sees none")
    sys.exit(main())
