"""Where the time of a step goes. Costs nothing until a profile is started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from kernel_core.api import BuildContext, Manifest, Section, Verb, hookimpl

if TYPE_CHECKING:
    from fastapi import APIRouter

    from kernel_core.nn.api import StepProbe, WorkerContext

RECORDER = "recorder"  # in the shared state of the worker part


class ProfilingSection(Section):
    directory: str | None = Field(
        None, description="where start_profile leaves traces, on the machine of the worker; without it start_profile is refused"
    )
    delay_steps: int = Field(0, ge=0, description="steps to let pass after start_profile")
    max_steps: int = Field(200, ge=1, le=10_000, description="a profile ends by itself after this many steps")
    record_shapes: bool = Field(False, description="traces tell the shapes of operators' inputs")
    profile_memory: bool = Field(False, description="traces tell what operators allocate")
    with_flops: bool = Field(False, description="traces tell the floating-point operations of matrix products")
    with_stack: bool = Field(False, description="traces tell the Python line of each operator (slow)")


manifest = Manifest(
    name="profiling",
    summary="start_profile and stop_profile, Chrome traces; `kernel profile`",
    section=ProfilingSection,
)


@hookimpl
def watch_steps(context: WorkerContext, models: Mapping[str, Any], probes: list[StepProbe]) -> None:
    from kernel_profiling.recorder import Recorder

    context.shared[RECORDER] = Recorder(context.section, context.rank, context.device, models, probes)


@hookimpl
def register_calls(context: BuildContext) -> Mapping[str, Callable[[bytes], bytes]]:
    """Of the worker part: "profiling.start" and "profiling.stop"."""
    if context.part != "worker":
        return {}

    def start(data: bytes) -> bytes:
        return context.shared[RECORDER].start(data)

    def stop(data: bytes) -> bytes:
        return context.shared[RECORDER].stop()

    return {"start": start, "stop": stop}


@hookimpl
def register_verbs(context: BuildContext) -> Mapping[str, Verb]:
    from kernel_profiling.verbs import start_profile, stop_profile

    return {"start_profile": start_profile, "stop_profile": stop_profile}


@hookimpl(optionalhook=True)
def register_routes(context: BuildContext, engine: Any) -> APIRouter:
    from kernel_profiling.routes import make_router

    return make_router(engine)
