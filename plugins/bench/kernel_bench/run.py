"""`kernel bench`: the cost of a step without a model, an engine's speed with one, and a server under load."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from kernel_bench.measure import measure
from kernel_bench.processes import peak_memory
from kernel_bench.serving import bench_serve
from kernel_bench.workloads import WORKLOADS
from kernel_core.api import Engine, RequestError, config_from_arguments
from kernel_core.testing import step_bench
from kernel_core.testing.parts import null_parts

QUICK = 0.1


def run(arguments: argparse.Namespace) -> int:
    result = MEASURES[arguments.what](arguments)
    sys.stdout.write(json.dumps(result) + "\n" if arguments.json else _table(result))
    return 0


def bench_step(arguments: argparse.Namespace) -> dict[str, Any]:
    plugins = [name for name in arguments.plugins.split(",") if name]
    parts = null_parts(config_from_arguments(arguments), plugins)
    measured = step_bench.run(arguments.running, arguments.churn, arguments.steps, parts=parts)
    return {**measured, "plugins": plugins}


def bench_run(arguments: argparse.Namespace) -> dict[str, Any]:
    names = arguments.workload or list(WORKLOADS)
    unknown = sorted(set(names) - set(WORKLOADS))
    if unknown:
        raise RequestError(f"there is no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    chosen = {name: WORKLOADS[name].scaled(QUICK) if arguments.quick else WORKLOADS[name] for name in names}
    with Engine(config_from_arguments(arguments)) as engine:
        sys.stderr.write(engine.summary + "\n")
        measure(engine, WORKLOADS["b"].scaled(0.05), arguments.seed)  # warm
        results = {}
        for name, workload in chosen.items():
            runs = [measure(engine, workload, arguments.seed) for _ in range(arguments.repeat)]
            results[name] = min(runs, key=lambda result: result["seconds"])
        return {
            "start_seconds": round(engine.start_seconds, 3),
            "start_phases_s": {name: round(seconds, 3) for name, seconds in engine.core.report.timings.items()},
            "peak_memory_bytes": peak_memory(),
            "workloads": results,
        }


MEASURES = {"step": bench_step, "run": bench_run, "serve": bench_serve}


def _table(result: dict[str, Any], indent: str = "") -> str:
    """Names and values, nested ones below their name."""
    lines = []
    for name, value in result.items():
        nested = isinstance(value, dict)
        lines.append(f"{indent}{name}:\n{_table(value, indent + '  ')}" if nested else f"{indent}{name:24} {value}\n")
    return "".join(lines)
