"""Prints the survey as a table, or the resolved plan with its reasons; both also as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kernel_core import api

STYLES = {"enabled": "bold green", "default": "green", "broken": "bold red", "missing": "yellow", "off": "dim"}


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
        raise api.ConfigError("--explain ops is not there yet: ops are chosen when the model is built, after the plan")
    else:
        print_survey(api.survey(config), arguments.json)
    return 0


def explain_plan(plan: api.ResolvedPlan, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(plan.to_json().decode() + "\n")
        return
    sys.stdout.write("\n".join(plan.explanation) + f"\nplan {plan.hash[:16]}\n")


def print_survey(rows: list[api.Row], as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "kind", "version", "state"):
        table.add_column(heading, no_wrap=heading != "name", overflow="fold")
    table.add_column("", overflow="fold")
    for row in rows:
        state = Text(row.state, STYLES.get(row.state, ""))
        table.add_row(Text(row.name), row.kind, row.version, state, Text(row.reason or row.summary))
    Console().print(table)
