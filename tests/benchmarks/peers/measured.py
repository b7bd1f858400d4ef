"""What every measured engine shares: its command line, the workloads, the meter, and one JSON object a workload on stdout.

Runs in the environment of each engine, so it needs the standard library only."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "plugins" / "bench" / "kernel_bench"))

from processes import LoadMeter, peak_memory
from workloads import WORKLOADS

#: prompts as (token ids, new tokens) → (tokens made, seconds to the first token of any request or None)
Run = Callable[[list[tuple[list[int], int]]], tuple[int, float | None]]


def serve(start: Callable[[str, int], Run]) -> None:
    """Start the engine on a checkpoint with a number of threads, warm it up, run each workload."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("workloads")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    vocab = json.loads(Path(options.checkpoint, "config.json").read_text())["vocab_size"]
    begin = time.monotonic()
    run = start(options.checkpoint, options.threads)
    start_seconds = time.monotonic() - begin
    run(WORKLOADS["b"].scaled(0.05).make(vocab))
    for name in options.workloads.split(","):
        workload = WORKLOADS[name] if options.scale == 1 else WORKLOADS[name].scaled(options.scale)
        requests = workload.make(vocab)
        meter, begin = LoadMeter(), time.monotonic()
        made, first = run(requests)
        seconds, load = time.monotonic() - begin, meter.read()
        report = {"workload": name, "seconds": seconds, "tokens": made, "tokens_per_s": made / seconds, "ttft_s": first}
        report |= {"start_s": start_seconds, "peak_bytes": peak_memory(), "own_cores": load.own, "foreign_cores": load.foreign}
        print(json.dumps(report), flush=True)
