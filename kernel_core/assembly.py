"""From a configuration to the pieces of an engine: resolve, find the checkpoint, ask the plugins for their parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kernel_core.checkpoints import find_checkpoint
from kernel_core.config import KernelConfig
from kernel_core.contexts import BuildContext, EngineContext, ModelInfo
from kernel_core.engine import Assembly, EngineCore, EngineParts
from kernel_core.errors import ConfigError
from kernel_core.executor import InProcessExecutor
from kernel_core.intake import FieldSet, Intake, Limits, sampling_defaults
from kernel_core.plan import Allocation, WorkerReport
from kernel_core.protocols import CheckpointFormat, Executor, TextCodec
from kernel_core.registry import Registry
from kernel_core.request import KERNEL_FIELDS, Updates
from kernel_core.resolver import ResolvedPlan, resolve
from kernel_core.settings import config_from_keywords

TEXT = "text/1"


def assemble(config: KernelConfig | Mapping[str, Any] | None, keys: Mapping[str, Any], enable: Sequence[str]) -> Assembly:
    """Everything that a configuration asks for, up to (not including) the start of the workers."""
    plan = resolve(config_from_keywords(config, **keys), enable=enable)
    model = inspect_model(plan)
    face, engine = Registry(plan, "face", model), Registry(plan, "engine", model)

    def close() -> None:
        face.close()
        engine.close()

    try:
        codec = face.service(TEXT, TextCodec) if _provided(plan, face) else None
        return Assembly(
            core=lambda emit: _core(plan, model, engine, emit),
            intake=lambda core: _intake(plan, model, face, codec, core),
            codec=codec,
            name=plan.config.model,
            device=plan.device.name,
            close=close,
        )
    except BaseException:
        close()
        raise
