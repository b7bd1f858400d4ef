"""`kernel bench serve`: load on a running server, and what its users would have felt."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from kernel_bench.traffic import MIXES, Shape, read_prompts
from kernel_core.api import RequestError

KEY = "KERNEL_API_KEY"
GOALS = ("ttft", "tpot", "e2e")


def bench_serve(arguments: argparse.Namespace) -> dict[str, Any]:
    """Raises RequestError for what cannot be measured."""
    try:
        from kernel_bench.latency_report import picture, report
        from kernel_bench.sending import Target, first_model, send_all
    except ModuleNotFoundError as error:
        raise RequestError(f"kernel bench serve needs an HTTP client: pip install 'kernel-bench[serve]' ({error})") from error
    goals, shape, url = read_goals(arguments.goal), shape_of(arguments), arguments.url.rstrip("/").removesuffix("/v1")
    planned = shape.make(_prompts(arguments.dataset))
    key = arguments.api_key or os.environ.get(KEY)
    fields = {"temperature": arguments.temperature} | ({} if arguments.respect_eos else {"ignore_eos": True})

    async def measure() -> tuple[str, list[Any]]:
        model = arguments.served_model or await first_model(url, key)
        target = Target(url, key, model, arguments.api == "chat", fields)
        with progress(len(planned), not arguments.json and sys.stderr.isatty()) as shown:
            return model, await send_all(target, planned, arguments.concurrency, lambda answered: shown())

    model, answers = asyncio.run(measure())
    made = {"url": url, "model": model, "load": load_text(shape, arguments), **report(answers, goals)}
    if arguments.plot:
        Path(arguments.plot).write_text(picture(answers, f"{model}: {made['load']}"), encoding="utf-8")
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return made


def shape_of(arguments: argparse.Namespace) -> Shape:
    mix = MIXES[arguments.mix]
    if arguments.prompt_len is not None:
        mix = replace(mix, prompt=arguments.prompt_len)
    if arguments.output_len is not None:
        mix = replace(mix, answer=arguments.output_len)
    if arguments.spread is not None:
        mix = replace(mix, spread=arguments.spread)
    bounds = {"--requests": arguments.requests, "--prefix-groups": arguments.prefix_groups, "--longest": arguments.longest}
    bounds |= {"--concurrency": arguments.concurrency or 1, "--rate": math.ceil(min(arguments.rate or 1, 1e9))}
    bounds |= {"--prompt-len": math.ceil(mix.prompt), "--output-len": math.ceil(mix.answer), "--burstiness": arguments.burstiness}
    for name, value in bounds.items():
        if not value > 0:
            raise RequestError(f"{name} must be positive")
    rate = None if arguments.concurrency else arguments.rate or math.inf
    groups, prefix = arguments.prefix_groups, arguments.shared_prefix
    return Shape(arguments.requests, mix, rate, arguments.burstiness, prefix, groups, arguments.longest, arguments.seed)


def read_goals(texts: list[str]) -> dict[str, float]:
    """["ttft=0.5", ...] → {"ttft": 0.5}. Raises RequestError."""
    goals = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            goals[name] = float(value)
        except ValueError:
            goals[name] = math.nan
        if name not in GOALS or not goals[name] > 0:
            raise RequestError(f"--goal {text}: give NAME=SECONDS, with one of {', '.join(GOALS)}")
    return goals


def _prompts(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        found = read_prompts(Path(path))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RequestError(f'{path}: one JSON object a line, with "prompt" or "turns" ({error})') from error
    if not found:
        raise RequestError(f"{path} has no prompts")
    return found


def load_text(shape: Shape, arguments: argparse.Namespace) -> str:
    how = f"{arguments.concurrency} at once" if shape.rate is None else f"{shape.rate:g} requests/s"
    shared = f", {shape.prefix} words shared in each of {shape.groups} groups" if shape.prefix else ""
    return f"{shape.requests} requests of the mix {arguments.mix}, {how}{shared}"


@contextmanager
def progress(total: int, bar: bool) -> Iterator[Any]:
    """→ what is called for each answer."""
    if not bar:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    with Progress(
        TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=Console(stderr=True)
    ) as shown:
        task = shown.add_task("", total=total)
        yield lambda: shown.advance(task)
