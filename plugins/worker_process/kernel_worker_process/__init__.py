"""Runs the worker in a process of its own. The engine and the worker share a socket and nothing else."""

from __future__ import annotations

from pydantic import Field

from kernel_core.api import BuildContext, Executor, Manifest, Section, hookimpl


class WorkerProcessSection(Section):
    close_seconds: float = Field(10.0, gt=0, description="how long a worker may take to stop before it is killed")
    step_seconds: float = Field(
        300.0, gt=0, description="how long a step may take before the worker counts as hung: it is killed and the engine ends"
    )


manifest = Manifest(
    name="worker_process",
    summary="Runs the worker in a process of its own, so that the engine plans while it computes",
    section=WorkerProcessSection,
)


@hookimpl
def make_executor(context: BuildContext, plan: bytes) -> Executor:
    from kernel_worker_process.executor import WorkerProcess

    return WorkerProcess(plan, context.model, context.section)
