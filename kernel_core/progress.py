"""The bar that `LLM` shows on a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kernel_core.request import RequestOutput

if TYPE_CHECKING:
    import rich.progress


class Progress:
    """Finished requests of a total, and output tokens a second. Does nothing unless `shown`."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._shown = total, shown
        self._tokens: dict[str, int] = {}
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Progress:
        if self._shown:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
            self._bar = Bar(*columns, TextColumn("{task.fields[speed]}"), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task("requests", total=self._total, speed="")
            self._start = time.monotonic()
        return self

    def update(self, changed: Iterable[RequestOutput]) -> None:
        if self._bar is None:
            return
        for output in changed:
            self._tokens[output.request_id] = sum(len(c.token_ids) for c in output.outputs)
            if output.finished:
                self._bar.advance(self._task)
        speed = sum(self._tokens.values()) / max(time.monotonic() - self._start, 1e-6)
        self._bar.update(self._task, speed=f"{speed:,.0f} tokens/s")

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
