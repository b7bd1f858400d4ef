"""From a configuration to the pieces of an engine: resolve, find the checkpoint, ask the plugins for their parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from kernel_core import sizes
from kernel_core.checkpoints import find_checkpoint
from kernel_core.config import KernelConfig
from kernel_core.contexts import BuildContext, EngineContext, ModelInfo
from kernel_core.engine import Assembly, EngineCore, EngineFacts, EngineParts
from kernel_core.errors import ConfigError
from kernel_core.executor import InProcessExecutor
from kernel_core.intake import FieldSet, Intake, Limits, sampling_defaults
from kernel_core.plan import Allocation, WorkerReport
from kernel_core.protocols import Executor, TextCodec, Verb
from kernel_core.registry import Registry
from kernel_core.request import KERNEL_FIELDS, Updates
from kernel_core.resolver import ResolvedPlan, resolve
from kernel_core.settings import config_from_keywords

TEXT = "text/1"


def assemble(config: KernelConfig | Mapping[str, Any] | None, keys: Mapping[str, Any], enable: Sequence[str]) -> Assembly:
    """Everything that a configuration asks for, up to (not including) the start of the workers."""
    plan = resolve(config_from_keywords(config, **keys), enable=enable)
    model = inspect_model(plan)
    face, engine = open_face(plan, model), Registry(plan, "engine", model)

    def close() -> None:
        face.close()
        engine.close()

    return Assembly(
        core=lambda emit: _core(plan, model, engine, emit),
        intake=lambda core: face.intake(core.facts()),
        codec=face.codec,
        name=plan.config.model,
        device=plan.device.name,
        close=close,
        verbs=face.verbs,
        service=face.registry.service,
    )


def inspect_model(plan: ResolvedPlan) -> ModelInfo:
    """Find the checkpoint and let the enabled format that recognises it read its configuration. Raises ConfigError."""
    path = str(find_checkpoint(plan.config.model))
    registry = Registry(plan, "face", ModelInfo(path, "", {}))
    formats = [made for _, made in registry.call("make_checkpoint")]
    found = next((made for made in formats if made.recognises(path)), None)
    if found is None:
        known = ", ".join(made.format for made in formats) or "none"
        raise ConfigError(f"no enabled plugin reads the checkpoint {path} (formats: {known}); `kernel plugins` lists the others")
    info: ModelInfo = found.inspect(path)
    registry.close()
    if plan.config.tokenizer is not None:
        info = replace(info, tokenizer_path=str(find_checkpoint(plan.config.tokenizer)))
    return info


# ---- face


@dataclass(frozen=True, slots=True)
class Face:
    """The face part of an engine, which may run in another process than the engine."""

    registry: Registry
    codec: TextCodec | None
    fields: Sequence[FieldSet]
    verbs: Mapping[str, Verb]

    def intake(self, facts: EngineFacts) -> Intake:
        """For requests to the engine of these facts."""
        engine, model = self.registry.plan.config.engine, self.registry.model
        known = [*KERNEL_FIELDS, *(name for f in self.fields if f.model is not None for name in f.model.model_fields)]
        defaults = sampling_defaults(model.generation, known) if engine.sampling_defaults == "model" else {}
        limits = Limits(
            max_model_len=facts.max_model_len,
            vocab_size=facts.vocab_size,
            max_logprobs=engine.max_logprobs,
            max_tokens=defaults.get("max_tokens"),
            priorities=facts.has_policy,
            seed=engine.seed,
        )
        return Intake(limits, self.codec, self.fields, defaults)

    def close(self) -> None:
        self.registry.close()


def open_face(plan: ResolvedPlan, model: ModelInfo) -> Face:
    """Build what the plugins have in the face. Raises ConfigError, PluginError."""
    registry = Registry(plan, "face", model)
    try:
        codec = registry.service(TEXT, TextCodec) if registry.provider(TEXT) else None
        return Face(registry, codec, _fieldsets(registry), _verbs(registry))
    except BaseException:
        registry.close()
        raise


def _verbs(face: Registry) -> dict[str, Verb]:
    from kernel_core.llm import LLM

    found: dict[str, tuple[str, Verb]] = {}
    for plugin, verbs in face.call("register_verbs"):
        for name, verb in verbs.items():
            owner = "LLM itself" if hasattr(LLM, name) else found.setdefault(name, (plugin, verb))[0]
            if owner != plugin:
                raise ConfigError(f"the method {name!r} of the plugin {plugin!r} belongs to {owner}: enable only one")
    return {name: verb for name, (_, verb) in found.items()}


def _fieldsets(face: Registry) -> list[FieldSet]:
    """Who reads request fields, in resolved order."""
    preparers = dict(face.call("prepare_request"))
    models = face.fields()
    names = [entry.name for entry in (face.plan.device, *face.plan.plugins)]
    return [
        FieldSet(name, models[name].request if name in models else None, preparers.get(name))
        for name in names
        if name in models or name in preparers
    ]


# ---- engine


@dataclass(frozen=True, slots=True)
class EnginePart:
    """The engine part, started, without a face: for a process of its own."""

    registry: Registry
    core: EngineCore
    facts: EngineFacts

    def close(self) -> None:
        self.core.close()
        self.registry.close()


def open_engine(plan: ResolvedPlan, model: ModelInfo, emit: Callable[[Updates], None]) -> EnginePart:
    """Start the workers and everything up to the loop; `emit` gets every `Updates`. Raises ConfigError, PluginError,
    CapacityError."""
    started = time.monotonic()
    registry = Registry(plan, "engine", model)
    try:
        core = _core(plan, model, registry, emit)
    except BaseException:
        registry.close()
        raise
    seconds = time.monotonic() - started
    summary = sizes.summary(plan.config.model, plan.device.name, core.report, core.allocation, seconds)
    return EnginePart(registry, core, core.facts(summary, seconds))


def engine_parts(engine: Registry, report: WorkerReport, allocation: Allocation) -> EngineParts:
    """What the plugins of the engine part make, once the sizes are settled."""

    def context(plugin: str) -> EngineContext:
        base = engine.context(plugin)
        return EngineContext(
            **{field.name: getattr(base, field.name) for field in fields(BuildContext)},
            capabilities=report.capabilities,
            max_slots=allocation.max_slots,
            max_model_len=allocation.max_model_len,
            max_tokens_per_step=allocation.max_tokens_per_step,
            groups=report.groups,
            num_blocks=allocation.num_blocks,
        )

    index = next((made for _, made in engine.call("make_prefix_index", context)), None)
    connector = next(iter(engine.call("make_connector", context)), None)
    if connector is not None and index is None:
        raise ConfigError(
            f"{connector[0]!r} stores the KV blocks that a prefix index gives up, and there is none for this model: enable one "
            f"that fits, or set plugins.{connector[0]} = false"
        )
    return EngineParts(
        policies=tuple(engine.call("make_policy", context)),
        resources=tuple(made for _, made in engine.call("make_resource", context)),
        observers=tuple(made for _, made in engine.call("make_observer", context)),
        prefix_index=index,
        connector=None if connector is None else connector[1],
        calls={f"{p}.{name}": call for p, calls in engine.call("register_calls", context) for name, call in calls.items()},
    )


def _core(plan: ResolvedPlan, model: ModelInfo, engine: Registry, emit: Callable[[Updates], None]) -> EngineCore:
    executor = _executor(plan, model, engine)
    return EngineCore(plan.config.engine, executor, emit, partial(engine_parts, engine))


def _executor(plan: ResolvedPlan, model: ModelInfo, engine: Registry) -> Executor:
    if plan.executor is None:
        return InProcessExecutor(plan, model)
    made: list[tuple[str, Executor]] = engine.call("make_executor", plan=plan.to_json())
    if not made:
        raise ConfigError(f"executor = {plan.executor!r}: this plugin makes no executor; leave the key out")
    return made[0][1]
