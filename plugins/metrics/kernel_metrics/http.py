"""The face part: counts HTTP requests of this API process, and gives them to the engine part, which adds up those of all."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kernel_core.api import ConfigError, KernelError, encode
from kernel_metrics.histogram import Histogram
from kernel_metrics.records import HttpCounts
from kernel_metrics.series import HTTP_SECONDS

if TYPE_CHECKING:
    from kernel_metrics import MetricsSection

AFTER = 1.0  # seconds from the first request that was not told yet
UNKNOWN = "none"  # the route of paths that nobody serves: they are the client's words, and no label
logger = logging.getLogger("kernel_metrics")


class Exchange(Protocol):
    """What is read of an HTTP request (see `watch_http` of the server)."""

    request_id: str
    method: str
    path: str
    route: str
    status: int
    headers: Sequence[tuple[bytes, bytes]]
    started: float
    first_byte: float | None
    finished: float | None
    outputs: Sequence[Any]


class Sender:
    """Counts until they are sent; in the event loop. What a dead engine did not take is sent to the next one."""

    def __init__(self, call: Callable[[str, bytes], Awaitable[list[bytes]]]) -> None:
        self._call = call
        self._requests: Counter[tuple[str, str, int]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def count(self, exchange: Exchange) -> None:
        route = exchange.route or UNKNOWN
        self._requests[exchange.method, route, exchange.status] += 1
        self._seconds.setdefault(route, Histogram(HTTP_SECONDS)).observe(exchange.finished or 0.0)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(AFTER, self._send_later)

    async def flush(self) -> None:
        """Send what was counted. Raises EngineDeadError, and keeps it then."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        requests, self._requests = self._requests, Counter()
        seconds, self._seconds = self._seconds, {}
        if not requests:
            return
        rows = [(*key, times) for key, times in requests.items()]
        told = HttpCounts(rows, [(route, h.sum, h.counts) for route, h in seconds.items()])
        try:
            await self._call("metrics.add", encode(told))
        except KernelError:
            self._requests.update(requests)
            for route, histogram in seconds.items():
                self._seconds.setdefault(route, Histogram(HTTP_SECONDS)).add(histogram.sum, histogram.counts)
            raise

    def _send_later(self) -> None:
        task = asyncio.get_running_loop().create_task(self._try())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _try(self) -> None:
        try:
            await self.flush()
        except KernelError as error:
            logger.debug("HTTP counts are kept for the next engine: %s", error)


class HttpWatch:
    """Implements the server's `HttpObserver`."""

    def __init__(self, section: MetricsSection, sender: Sender) -> None:
        self._sender, self._tracer = sender, None
        if section.otlp_traces_endpoint is not None:
            try:
                from kernel_metrics.tracing import Tracer
            except ModuleNotFoundError as error:
                raise ConfigError(
                    f"plugins.metrics.otlp_traces_endpoint needs OpenTelemetry: pip install 'kernel-metrics[tracing]' ({error})"
                ) from error
            self._tracer = Tracer(section.otlp_traces_endpoint)

    def finished(self, exchange: Exchange) -> None:
        self._sender.count(exchange)
        if self._tracer is not None and exchange.outputs:
            self._tracer.span(exchange)
