"""A span of each HTTP request that the engine answered, sent in the background by OpenTelemetry. Needs the extra "tracing"."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

if TYPE_CHECKING:
    from kernel_metrics.http import Exchange

NANOSECONDS = 10**9


class Tracer:
    """Spans begin and end when the request did. The caller's trace goes on, where it sent a `traceparent`."""

    def __init__(self, endpoint: str) -> None:
        self._provider = TracerProvider(resource=Resource.create({"service.name": "kernel"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
        self._tracer = self._provider.get_tracer("kernel_metrics")
        self._propagator = TraceContextTextMapPropagator()

    def span(self, exchange: Exchange) -> None:
        """Rate: request."""
        begun = time.time_ns() - int((time.monotonic() - exchange.started) * NANOSECONDS)
        carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in exchange.headers}
        span = self._tracer.start_span(
            f"{exchange.method} {exchange.route}",
            self._propagator.extract(carrier),
            SpanKind.SERVER,
            dict(attributes(exchange)),
            start_time=begun,
        )
        if exchange.status == 0 or exchange.status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(begun + int((exchange.finished or 0.0) * NANOSECONDS))


def attributes(exchange: Exchange) -> Iterator[tuple[str, Any]]:
    yield "http.request.method", exchange.method
    yield "http.route", exchange.route
    yield "http.response.status_code", exchange.status
    yield "gen_ai.request.id", exchange.request_id
    choices = [choice for output in exchange.outputs for choice in output.outputs]
    yield "gen_ai.usage.input_tokens", sum(len(output.prompt_token_ids) for output in exchange.outputs)
    yield "gen_ai.usage.output_tokens", sum(len(choice.token_ids) for choice in choices)
    yield "gen_ai.response.finish_reasons", [choice.finish_reason or "none" for choice in choices]
    timings = exchange.outputs[0].timings
    for name in ("queued", "first_token", "finished"):
        seconds = getattr(timings, name)
        if seconds is not None:
            yield f"gen_ai.latency.{name}", seconds
