"""The engine parts of installed plugins, without a model: for measuring what they cost."""

from __future__ import annotations

from collections.abc import Sequence

from kernel_core.assembly import engine_parts
from kernel_core.config import KernelConfig
from kernel_core.contexts import ModelInfo
from kernel_core.engine import EngineParts
from kernel_core.plan import Allocation
from kernel_core.registry import Registry
from kernel_core.resolver import resolve
from kernel_core.testing.null import NullExecutor


def null_parts(config: KernelConfig, plugins: Sequence[str]) -> EngineParts:
    """Policy, resources and observers of the configured and the named plugins. Raises ConfigError for unknown ones."""
    registry = Registry(resolve(config, enable=plugins), "engine", ModelInfo("null", "null", {}))
    engine = config.engine
    length = 4096 if engine.max_model_len == "auto" else engine.max_model_len
    allocation = Allocation((1024,), engine.max_requests, length, engine.max_tokens_per_step)
    return engine_parts(registry, NullExecutor().start(), allocation)
