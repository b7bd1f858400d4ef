"""The engine parts of installed plugins, without a model: for measuring what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kernel_core.assembly import engine_parts
from kernel_core.config import KernelConfig
from kernel_core.contexts import ModelInfo
from kernel_core.engine import EngineParts
from kernel_core.plan import Allocation, WorkerReport
from kernel_core.registry import Registry
from kernel_core.resolver import resolve


def null_parts(config: KernelConfig, plugins: Sequence[str]) -> Callable[[WorkerReport, Allocation], EngineParts]:
    """Makes what the engine part of the named plugins, and of those that they need, makes; those of the profile are left out.
    Raises ConfigError for unknown ones."""
    alone = config.model_copy(update={"profile": "none"})
    return partial(engine_parts, Registry(resolve(alone, enable=plugins), "engine", ModelInfo("null", "null", {})))
