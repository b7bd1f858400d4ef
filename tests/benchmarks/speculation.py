"""Tokens a second with and without drafts, at batch 1, 8 and 32: the same engine twice, in turn, medians.

    python tests/benchmarks/speculation.py            # n-gram on Qwen2.5-0.5B's shape, the heads on the embedded model
    python tests/benchmarks/speculation.py --quick    # does it run?

`greedy`: output that repeats itself (random weights do), or that the heads were trained for. `random`: sampled at temperature 3,
where there is nothing to find: what an adaptive length loses there is the price of looking. Writes build/bench/speculation.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cpu_peers import BUILD, cpu_name, make_checkpoint

from kernel_core import Engine, SamplingParams
from kernel_core.api import DraftCounts

BATCHES = (1, 8, 32)
TINY_TIMES = 48  # the embedded model answers within some 20 steps of a millisecond: too little to be timed
QUESTIONS = [
    "os.path.join",
    "textwrap.dedent",
    "json.dumps",
    "shutil.copy",
    "random.shuffle",
    "os.listdir",
    "math.floor",
    "os.getcwd",
]
HEADS = {
    "eagle": {"eagle": {"head": "tiny-chat-eagle"}},
    "eagle3": {"eagle": {"head": "tiny-chat-eagle3"}},
    "eagle3 tree": {"eagle": {"head": "tiny-chat-eagle3", "tree": True, "draft_tokens": 8}},
    "mlp_speculator": {"mlp_speculator": {"head": "tiny-chat-mlp"}},
    "draft_model": {"draft_model": {"model": "tiny-draft"}},
}
Prompts = list[str] | list[list[int]]


def repeating(count: int, vocab: int) -> list[list[int]]:
    """Prompts of 96 tokens, each a motif of 12 eight times."""
    draw = random.Random(0)
    return [[draw.randrange(vocab // 2, vocab) for _ in range(12)] * 8 for _ in range(count)]


def asking(count: int) -> list[str]:
    return [f"<|user|>What does {QUESTIONS[i % len(QUESTIONS)]} do?<|end|><|assistant|>" for i in range(count)]


@contextlib.contextmanager
def engine(model: str, plugins: Mapping[str, Any], tokens_only: bool) -> Iterator[Engine]:
    base = {"profile": "none"} if tokens_only else {}
    extra = {"safetensors": {}} if tokens_only else {}
    keys = {"device": "cpu", "max_model_len": 512, "max_requests": max(BATCHES), "kv_memory": "1GiB"}
    with Engine(model=model, plugins={**extra, **plugins}, **base, **keys) as made:
        yield made


def run(made: Engine, prompts: Prompts, new: int, temperature: float, seed: int) -> float:
    """Output tokens a second, prompts included in the time. Greedy answers to questions end where the model ends them."""
    start, count = time.perf_counter(), 0
    for number, prompt in enumerate(prompts):
        endless = temperature > 0 or not isinstance(prompt, str)
        params = {
            "temperature": temperature,
            "max_tokens": new,
            "ignore_eos": endless,
            "seed": seed + number,
            "detokenize": False,
        }
        made.add_request(str(number), prompt, SamplingParams(**params))
    while made.has_unfinished_requests():
        count += sum(len(o.outputs[0].token_ids) for o in made.step() if o.finished)
    return count / (time.perf_counter() - start)


def compare(
    title: str, one: Engine, other: Engine, prompts: Prompts, arguments: argparse.Namespace, temperature: float, times: int
) -> dict:
    """Both in turn, the prompts `times` over in each round; the first round is not counted: lengths adapt in it."""
    speeds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(arguments.rounds + 1):
        if round_ == 1:
            other.outputs.drafts = DraftCounts()
        for kept, made in zip(speeds, (one, other), strict=True):
            several = [run(made, prompts, arguments.new, temperature, 1000 * round_ + 99 * i) for i in range(times)]
            speed = statistics.harmonic_mean(several)
            if round_:
                kept.append(speed)
    plain, drafted = map(statistics.median, speeds)
    length = other.outputs.drafts.mean_length
    ratio = f"{drafted / plain:5.2f}x  ({length:.2f} tokens a verification)"
    print(f"{title:24} batch {len(prompts):2}: {plain:7.1f} → {drafted:7.1f} tokens/s  {ratio}", flush=True)
    return {"title": title, "batch": len(prompts), "plain": plain, "drafted": drafted, "ratio": drafted / plain, "length": length}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape and few tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=48, help="output tokens of each request")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)))
    parser.add_argument("--only", default="", help="cases whose title contains this")
    arguments = parser.parse_args()
    arguments.rounds, arguments.new = (1, 8) if arguments.quick else (arguments.rounds, arguments.new)
    batches, results = [int(batch) for batch in arguments.batches.split(",")], []
    folder = make_checkpoint("quick" if arguments.quick else "full")
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    cases = [("n-gram", str(folder), {"ngram": {}}), *((name, "tiny-chat", plugins) for name, plugins in HEADS.items())]
    for name, model, plugins in cases:
        if arguments.only not in name:
            continue
        own = model == "tiny-chat"
        with engine(model, {}, not own) as one, engine(model, plugins, not own) as other:
            for batch in batches:
                prompts: Prompts = asking(batch) if own else repeating(batch, vocab)
                times = TINY_TIMES if own and not arguments.quick else 1
                results.append(compare(f"{name}, greedy", one, other, prompts, arguments, 0.0, times))
                results.append(compare(f"{name}, random", one, other, prompts, arguments, 3.0, times))
    BUILD.mkdir(parents=True, exist_ok=True)
    facts = {"cpu": cpu_name(), "threads": len(os.sched_getaffinity(0)), "quick": arguments.quick, "results": results}
    Path(BUILD / "speculation.json").write_text(json.dumps(facts, indent=1))
    worst = min(results, key=lambda result: result["ratio"])
    print(
        f"the worst is {worst['title']} at batch {worst['batch']}: {worst['ratio']:.2f}x; written to {BUILD / 'speculation.json'}"
    )


if __name__ == "__main__":
    sys.exit(main())
