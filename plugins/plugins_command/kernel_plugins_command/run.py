"""Prints the survey as a table, or the resolved plan with its reasons; both also as JSON."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernel_core import api
from kernel_plugins_command.survey import Row, survey

STYLES = {"enabled": "bold green", "default": "green", "broken": "bold red", "missing": "yellow", "off": "dim"}
WIDE = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--explain",
        nargs="?",
        const="plan",
        choices=["plan", "ops"],
        help="plan (default): who takes part, in which order, and why; ops: which implementation each op of the model got",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    config = api.config_from_arguments(arguments)
    if arguments.explain == "plan":
        explain_plan(api.resolve(config), arguments.json)
    elif arguments.explain == "ops":
        explain_ops(config, arguments.json)
    else:
        print_survey(survey(config), arguments.json)
    return 0


def explain_plan(plan: api.ResolvedPlan, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(plan.to_json().decode() + "\n")
        return
    sys.stdout.write("\n".join(plan.explanation) + f"\nplan {plan.hash[:16]}\n")


def explain_ops(config: api.KernelConfig, as_json: bool) -> None:
    """Ops are chosen when the model is built: start the engine, and ask the first rank."""
    with api.Engine(config) as engine:
        chosen = api.decode(engine.call("kernel.explain")[0], dict[str, Any])
    if as_json:
        sys.stdout.write(json.dumps(chosen, indent=1) + "\n")
        return
    table = _table("op", "owner", "for")
    for row in chosen["ops"]:
        table.add_row(*map(Text, row))
    for backend, layers in Counter(chosen["attention"].values()).items():
        table.add_row("attention", Text(backend), f"{layers} layers")
    _print(table)


def print_survey(rows: list[Row], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        return
    table = _table("name", "kind", "version", "state", "")
    for row in rows:
        state = Text(row.state, STYLES.get(row.state, ""))
        table.add_row(Text(row.name), row.kind, row.version, state, Text(row.reason or row.summary))
    _print(table)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE  # a pipe has no width; rows stay on one line each
    console.print(table)
