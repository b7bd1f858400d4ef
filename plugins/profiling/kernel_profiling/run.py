"""`kernel profile`: run a batch, say where its time went."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernel_core.api import ConfigError, Engine, RequestError, config_from_arguments
from kernel_profiling.batch import Batch, check_fits, of_steps, run_batch, to_completion
from kernel_profiling.chart import html_page
from kernel_profiling.records import Mode, Profile, Step
from kernel_profiling.tables import by_kind, model_rows, step_names, step_tree, summary_rows, to_csv
from kernel_profiling.verbs import start, stop

DEFAULT_STEPS, WIDE = 2, 160


def run(arguments: argparse.Namespace) -> int:
    batch = batch_from_arguments(arguments)
    with Engine(config_from_arguments(arguments)) as engine:
        sys.stderr.write(engine.summary + "\n")
        check_fits(engine, batch)
        for _ in range(arguments.warmup):
            run_batch(engine, batch)
        measured = record(engine, batch, "modules")
        wants = arguments.operators or arguments.csv or arguments.json or arguments.trace
        traced = record(engine, batch, "operators") if wants else None
        context = {"summary": engine.summary, "batch": asdict(batch), "device": measured.device}
    if not any(step.spans for step in measured.steps):
        sys.stderr.write("no module was called: the device replays captured graphs, so there are phases only\n")
    write_files(arguments, measured.steps, traced.steps if traced else [], context)
    if arguments.json != "-":
        print_tables(arguments, measured.steps, traced.steps if traced and arguments.operators else [])
    return 0


def batch_from_arguments(arguments: argparse.Namespace) -> Batch:
    """Raises RequestError."""
    size, length, seed = arguments.batch_size, arguments.prompt_len, arguments.seed
    if arguments.to_completion is not None:
        return to_completion(size, length, arguments.to_completion, seed)
    return of_steps(size, length, DEFAULT_STEPS if arguments.steps is None else arguments.steps, seed)


def record(engine: Engine, batch: Batch, mode: Mode) -> Profile:
    """Profile one run of the batch → what the first rank saw."""
    if "start_profile" not in engine.verbs:
        raise ConfigError("the plugin profiling is left out; enable it: plugins.profiling = true")
    start(engine.call, mode, max_steps=batch.num_steps)
    try:
        run_batch(engine, batch)
    finally:
        profiles = stop(engine.call)
    return profiles[0]


# ---- files


def write_files(arguments: argparse.Namespace, steps: Sequence[Step], traced: Sequence[Step], context: dict[str, Any]) -> None:
    if arguments.csv:
        for kind, found in by_kind(steps).items():
            _write(f"{arguments.csv}_{kind}_model_table.csv", to_csv(model_rows(step_tree(found))))
        for kind, found in by_kind(traced).items():
            _write(f"{arguments.csv}_{kind}_summary_table.csv", to_csv(summary_rows(found)))
    if arguments.trace:
        for name, step in zip(step_names(traced), traced):
            _write(str(Path(arguments.trace) / f"{name}.json"), step.trace.decode())
    if arguments.html:
        _write(arguments.html, html_page(steps, context["summary"]))
    if arguments.json:
        text = json.dumps(as_json(steps, traced, context), indent=1) + "\n"
        sys.stdout.write(text) if arguments.json == "-" else _write(arguments.json, text)


def as_json(steps: Sequence[Step], traced: Sequence[Step], context: dict[str, Any]) -> dict[str, Any]:
    """context, then each step by its name: metadata, summary_stats (operators), model_stats (modules)."""
    entries: dict[str, Any] = {"context": context}
    for name, step, under_profiler in zip(step_names(steps), steps, traced):
        metadata = {"num_running_seqs": step.rows, "num_tokens": step.tokens, "cpu_time_us": step.cpu, "phases_us": step.phases}
        entries[name] = {
            "metadata": metadata,
            "summary_stats": [asdict(row) for row in summary_rows([under_profiler])],
            "model_stats": [asdict(row) for row in model_rows(step_tree([step]))],
        }
    return entries


def _write(path: str, text: str) -> None:
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.part")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, target)
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error}") from error
    sys.stderr.write(f"wrote {path}\n")


# ---- tables


def print_tables(arguments: argparse.Namespace, steps: Sequence[Step], traced: Sequence[Step]) -> None:
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    for kind, found in by_kind(steps).items():
        console.print(f"\n{kind}: {len(found)} steps, {sum(step.tokens for step in found)} tokens", style="bold")
        console.print(_model_table(found, not arguments.layers, arguments.min_percent))
    for kind, found in by_kind(traced).items():
        console.print(f"\n{kind}: operators under torch.profiler, time of their own", style="bold")
        console.print(_summary_table(found, arguments.min_percent))


def _model_table(steps: Sequence[Step], merge: bool, least: float) -> Table:
    table = _table("module", "type")
    for row in model_rows(step_tree(steps, merge)):
        if row.pct_device_time >= least:
            name = "  " * row.depth + row.name
            table.add_row(
                Text(name), Text(row.type), *_numbers(row.device_time_us, row.pct_device_time, row.invocations, len(steps))
            )
    return table


def _summary_table(steps: Sequence[Step], least: float) -> Table:
    table = _table("operator")
    for row in summary_rows(steps):
        if row.pct_device_time >= least:
            table.add_row(Text(row.name), *_numbers(row.device_time_us, row.pct_device_time, row.invocations, len(steps)))
    return table


def _numbers(micros: float, percent: float, calls: int, steps: int) -> tuple[str, str, str]:
    return f"{micros / steps / 1e3:.3f}", f"{percent:.1f}", f"{calls / steps:g}"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for heading in ("ms/step", "%", "calls/step"):
        table.add_column(heading, justify="right")
    return table
