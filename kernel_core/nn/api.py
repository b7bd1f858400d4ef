"""Everything a plugin's torch side may import from the worker kernel."""

from kernel_core.contexts import ModelInfo
from kernel_core.nn.protocols import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    Device,
    Drafter,
    DraftView,
    Forward,
    HostTurn,
    LogitsTransform,
    MemoryReport,
    Model,
    ModelContext,
    OpRegistry,
    Rank,
    StepInputs,
    StepView,
    WeightFormat,
    Weights,
    WorkerContext,
)
from kernel_core.nn.transfer import upload


def open_worker(plan: bytes, model: ModelInfo, rank: int = 0, world_size: int = 1) -> Rank:
    """The worker of one rank, not started; `plan` is what `make_executor` was given. For executors, in the rank's process."""
    from kernel_core.nn.worker import Worker
    from kernel_core.resolver import ResolvedPlan

    return Worker(ResolvedPlan.from_json(plan), model, rank, world_size)


__all__ = [
    "AttentionBackend",
    "AttentionBatch",
    "AttentionSpec",
    "Device",
    "DraftView",
    "Drafter",
    "Forward",
    "HostTurn",
    "LogitsTransform",
    "MemoryReport",
    "Model",
    "ModelContext",
    "OpRegistry",
    "Rank",
    "StepInputs",
    "StepView",
    "WeightFormat",
    "Weights",
    "WorkerContext",
    "open_worker",
    "upload",
]
