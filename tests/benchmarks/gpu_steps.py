"""Steps that are not plain decoding, with the CUDA device's settings off and on: ms a step, whole steps in the overlapped loop.

    python tests/benchmarks/gpu_steps.py                                  # tiny-chat: what the host costs
    python tests/benchmarks/gpu_steps.py --model 1b --kinds drafts,prompts --batches 16
    python tests/benchmarks/gpu_steps.py --device cpu --steps 3           # does it run?

Models: tiny-chat, or 0.5b, 1b, 8b with random weights. Each setting has an engine of its own, one after the other. "prompts": a
new request of 96 tokens in every step, beside those that decode.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from gpu import BUILD, SHAPES, folder

from kernel_core import Engine

DRAFTS = {"ngram": {"adaptive": False}}
#: (what requests ask for, plugins)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "prompts": ({}, {}),
    "filters": ({"temperature": 0.8, "top_p": 0.9, "logprobs": 0}, {}),
    "logprobs": ({"logprobs": 5}, {}),
    "penalties": ({"repetition_penalty": 1.1, "presence_penalty": 0.2}, {}),
    "drafts": ({}, DRAFTS),
    "guided": ({"structured_outputs": {"regex": "[a-z ]{800}"}, "ignore_eos": False}, {"guided_decoding": {}}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "no graphs": {"graphs": False},
    "as it is": {},
    "model_graphs": {"model_graphs": True},
    "fused_steps": {"fused_steps": True},
    "both": {"model_graphs": True, "fused_steps": True},
    "all three": {"model_graphs": True, "fused_steps": True, "mixed_flash": True},
}
PROMPT, WARM = 96, 24  # tokens of a new prompt; steps before those that are timed


def open_engine(arguments: argparse.Namespace, kind: str, setting: str) -> Engine:
    on_gpu = arguments.device == "cuda"
    plugins = {**KINDS[kind][1], **({"cuda": SETTINGS[setting]} if on_gpu else {})}
    keys = dict(device=arguments.device, max_requests=128, max_model_len=2048, dtype="bfloat16" if on_gpu else "float32")
    if arguments.model in SHAPES:
        plugins = {"safetensors": {}, "penalties": {}, **plugins}
        return Engine(model=str(folder(arguments.model)), random_weights=True, profile="none", plugins=plugins, **keys)
    return Engine(model=arguments.model, plugins=plugins, **keys)


def step_time(engine: Engine, kind: str, batch: int, steps: int) -> float:
    """Seconds a step of `batch` requests."""
    draw = random.Random(0)
    asked = {"temperature": 0, "max_tokens": 1500, "ignore_eos": True, "detokenize": False, **KINDS[kind][0]}

    def add(name: str, tokens: int, **others: Any) -> None:
        prompt = [draw.randrange(10, 200) for _ in range(8)] * (tokens // 8)
        engine.add_request(name, prompt, engine.intake.params(**{**asked, **others}))

    def run(count: int, first: int) -> None:
        for number in range(first, first + count):
            if kind == "prompts":
                add(f"new {number}", PROMPT, max_tokens=1)
            engine.advance()

    for number in range(batch):
        add(str(number), 32)
    run(WARM, 0)
    synchronize()
    began = time.perf_counter()
    run(steps, WARM)
    synchronize()
    seconds = (time.perf_counter() - began) / steps
    engine.abort([str(number) for number in range(batch)])
    while engine.has_unfinished_requests():
        engine.advance()
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    listed = lambda kind: lambda text: [kind(part) for part in text.split(",") if part]  # noqa: E731
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kinds", type=listed(str), default=[*KINDS], help=f"of {', '.join(KINDS)}")
    parser.add_argument("--settings", type=listed(str), default=[*SETTINGS], help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--batches", type=listed(int), default=[16])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=BUILD / "gpu_steps.json")
    return parser.parse_args()


def main() -> int:
    arguments, lines = parse(), []
    settings = arguments.settings if arguments.device == "cuda" else ["as it is"]
    print(f"{'ms a step':12}" + "".join(f"{name:>16}" for name in settings))
    for kind in arguments.kinds:
        taken: dict[int, list[float]] = {batch: [] for batch in arguments.batches}
        for setting in settings:
            with open_engine(arguments, kind, setting) as engine:
                for batch in arguments.batches:
                    taken[batch].append(1e3 * step_time(engine, kind, batch, arguments.steps))
        for batch, times in taken.items():
            print(f"{kind:9}{batch:3}" + "".join(f"{ms:16.3f}" for ms in times), flush=True)
            lines.append({"model": arguments.model, "kind": kind, "batch": batch, "ms": dict(zip(settings, times, strict=True))})
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(lines, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
