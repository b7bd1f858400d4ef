"""Numbers about an engine: `/metrics` for Prometheus, `llm.get_metrics()`, and spans for OpenTelemetry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kernel_core.api import BuildContext, EngineContext, Manifest, Observer, Section, Verb, hookimpl

if TYPE_CHECKING:
    from fastapi import APIRouter

RECORDER = "recorder"  # in the shared state of the engine part
SENDER = "sender"  # in the shared state of the face


class MetricsSection(Section):
    model_name: str | None = Field(None, description="the label model_name; without it, `model`")
    compatible_names: bool = Field(False, description="export everything a second time under the names of vLLM's dashboards")
    otlp_traces_endpoint: str | None = Field(
        None, description="send a span of each HTTP request to this OTLP/HTTP address, as http://127.0.0.1:4318/v1/traces"
    )


manifest = Manifest(
    name="metrics",
    summary="/metrics for Prometheus, llm.get_metrics(), OpenTelemetry spans",
    section=MetricsSection,
)


@hookimpl
def make_observer(context: EngineContext) -> Observer:
    from kernel_metrics.recorder import Recorder

    context.shared[RECORDER] = recorder = Recorder(context)
    return recorder


@hookimpl
def register_calls(context: BuildContext) -> Mapping[str, Callable[[bytes], bytes]]:
    """Of the engine part: "metrics.read" gives everything, "metrics.add" takes what an API process counted."""
    if context.part != "engine":
        return {}

    def read(data: bytes) -> bytes:
        return context.shared[RECORDER].read()

    def add(data: bytes) -> bytes:
        return context.shared[RECORDER].add(data)

    return {"read": read, "add": add}


@hookimpl
def register_verbs(context: BuildContext) -> Mapping[str, Verb]:
    from kernel_metrics.reading import verb

    return {"get_metrics": verb(context)}


@hookimpl(optionalhook=True)
def register_routes(context: BuildContext, engine: Any) -> APIRouter:
    from kernel_metrics.http import Sender
    from kernel_metrics.routes import make_router

    context.shared[SENDER] = sender = Sender(engine.call)
    return make_router(context, engine, sender)


@hookimpl(optionalhook=True)
def watch_http(context: BuildContext) -> Any:
    from kernel_metrics.http import HttpWatch

    return HttpWatch(context.section, context.shared[SENDER])
