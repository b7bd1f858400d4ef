"""`kernel run-batch`: a file of requests, a file of answers."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx

from kernel_core.api import AsyncEngine, KernelConfig, RequestError, config_from_arguments
from kernel_openai_batch import BatchSection, manifest
from kernel_openai_batch.batch import lines
from kernel_openai_batch.output import Output, succeeded
from kernel_openai_batch.remote import download, is_url, local_name, upload
from kernel_openai_batch.rows import Row, read_rows

SERVER, KEY = "openai_server", "KERNEL_API_KEY"


@dataclass(slots=True)
class Counts:
    """Lines of the output: those of runs before, and those of this one."""

    kept: int = 0
    answered: int = 0
    failed: int = 0

    def __str__(self) -> str:
        kept = f", {self.kept} from a run before" if self.kept else ""
        return f"{self.kept + self.answered + self.failed} requests{kept}, {self.failed} with errors"


def run(arguments: argparse.Namespace) -> int:
    """0: every request has its answer; 1: some have errors. Raises RequestError, EngineDeadError."""
    config = config_from_arguments(arguments)
    section = _section(config)
    concurrency = section.concurrency if arguments.concurrency is None else arguments.concurrency
    if concurrency < 1:
        raise RequestError("--concurrency must be at least 1")
    uploads = is_url(arguments.output_file)
    folder = Path(arguments.output_tmp_dir or ".")
    target = local_name(arguments.output_file, folder) if uploads else Path(arguments.output_file)
    with _local_input(arguments.input_file, section) as source:
        _check_files(source, target)
        output = Output(target, arguments.restart)
        try:
            counts = _answer(config, section, source, output, concurrency, not arguments.quiet and sys.stderr.isatty())
            output.finish()
        finally:
            output.close()
    sys.stderr.write(f"{counts}: {target}\n")
    if uploads:
        upload(target, arguments.output_file, section)
        target.unlink()
    return 1 if counts.failed else 0


def _section(config: KernelConfig) -> BatchSection:
    values = config.plugins.get(manifest.name)
    return BatchSection.model_validate(values if isinstance(values, dict) else {})


@contextmanager
def _local_input(name: str, section: BatchSection) -> Iterator[Path]:
    if not is_url(name):
        yield Path(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input.jsonl"
        download(name, path, section)
        yield path


def _check_files(source: Path, target: Path) -> None:
    if not source.is_file():
        raise RequestError(f"there is no input file {str(source)!r}")
    if target.exists() and source.samefile(target):
        raise RequestError(f"input and output are the same file {str(target)!r}")


# ---- the run


def _answer(config: KernelConfig, section: BatchSection, source: Path, output: Output, concurrency: int, bar: bool) -> Counts:
    """Check what is kept, then answer the rest; the engine starts only if there is a rest."""
    with source.open("rb") as file:
        rows = read_rows(file, section.max_line_bytes)
        _check_kept(islice(rows, len(output.kept)), output)
        counts = Counts(kept=len(output.kept) - output.kept_failed, failed=output.kept_failed)
        first = next(rows, None)
        if first is not None:
            total = _count_lines(source) if bar else 0
            with _progress(total, len(output.kept), bar) as shown:
                asyncio.run(_run(config, _chain(first, rows), output, concurrency, counts, shown))
    return counts


def _check_kept(rows: Iterator[Row], output: Output) -> None:
    """The lines that are there must be the answers to the first requests. Raises RequestError."""
    if [row.id for row in rows] != output.kept:
        raise RequestError(
            f"{output.path} has answers to other requests than this input begins with: choose another file, or --restart"
        )


def _chain(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


async def _run(config: KernelConfig, rows: Iterator[Row], output: Output, concurrency: int, counts: Counts, shown: Any) -> None:
    engine = await asyncio.to_thread(AsyncEngine, config)
    async with engine:
        sys.stderr.write(engine.summary + "\n")
        transport = httpx.ASGITransport(engine.service("openai/1").app(engine), raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://batch", headers=_authorisation(config), timeout=None
        ) as client:
            async for line in lines(client, rows, concurrency, lambda: engine.dead):
                output.write(line)
                if succeeded(json.loads(line)):
                    counts.answered += 1
                else:
                    counts.failed += 1
                shown()


def _authorisation(config: KernelConfig) -> dict[str, str]:
    """The application asks for a key where one is configured; this process may read it."""
    section = config.plugins.get(SERVER)
    keys = section.get("api_keys", ()) if isinstance(section, dict) else ()
    key = next(iter(keys), None) or os.environ.get(KEY)
    return {"Authorization": f"Bearer {key}"} if key else {}


# ---- progress


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


@contextmanager
def _progress(total: int, done: int, bar: bool) -> Iterator[Any]:
    """→ what is called for each line."""
    if not bar:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total, completed=done)
        yield lambda: progress.advance(task)
