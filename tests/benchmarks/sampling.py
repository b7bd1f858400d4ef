"""What a step takes with what requests ask for of sampling: the same engine, the kinds in turn, medians of decode steps.

python tests/benchmarks/sampling.py               # Qwen2.5-0.5B's shape, 151,936 tokens, batch 1 and 8
python tests/benchmarks/sampling.py --quick       # does it run?
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from typing import Any

from cpu_peers import cpu_name, make_checkpoint

from kernel_core import Engine

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7, top_p 0.8, top_k 20": {"temperature": 0.7, "top_p": 0.8, "top_k": 20},
    "temperature 1, top_p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "temperature 1, min_p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "repetition penalty": {"repetition_penalty": 1.1},
    "presence and frequency penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5},
    "five logprobs": {"logprobs": 5},
}


def step_times(engine: Engine, batch: int, new: int, asked: dict[str, Any], seed: int) -> list[float]:
    """Seconds of the decode steps of `batch` requests."""
    draw, seconds = random.Random(seed), []
    for number in range(batch):
        prompt = [draw.randrange(500) for _ in range(16)]
        params = {"temperature": 0.0, "max_tokens": new, "ignore_eos": True, "seed": seed, "detokenize": False}
        engine.add_request(str(number), prompt, engine.intake.params(**params | asked))
    while engine.has_unfinished_requests():
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny shape and few tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", default="1,8")
    arguments = parser.parse_args()
    folder, new = make_checkpoint("quick" if arguments.quick else "full"), 4 if arguments.quick else 12
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    keys = {"device": "cpu", "max_model_len": 512, "max_requests": 32, "kv_memory": "1GiB"}
    print(f"{cpu_name()}, {vocab_size} tokens")
    with Engine(model=str(folder), profile="none", plugins={"safetensors": {}, "penalties": {}}, **keys) as engine:
        for batch in map(int, arguments.batches.split(",")):
            seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for round_ in range(1 if arguments.quick else arguments.rounds):
                for kind in list(KINDS)[:: -1 if round_ % 2 else 1]:
                    seconds[kind] += step_times(engine, batch, new, KINDS[kind], round_)
            plain = statistics.median(seconds["greedy"])
            for kind, times in seconds.items():
                took = statistics.median(times)
                print(f"batch {batch:2}  {kind:38} {1e3 * took:7.2f} ms  {took / plain:5.2f} x greedy", flush=True)


if __name__ == "__main__":
    sys.exit(main())
