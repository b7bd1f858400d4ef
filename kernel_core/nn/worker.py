"""One rank: opens the device, builds the model, allocates what the kernel decides, and runs plans.

`start` → `allocate` → many `submit` (or `run`) → `close`. Everything is made from the frozen plan, so that every rank of
an engine, in whatever process, comes out the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from functools import partial
from time import perf_counter
from typing import Any

import torch

from kernel_core.checkpoints import find_checkpoint
from kernel_core.contexts import BuildContext, ModelInfo
from kernel_core.errors import CapacityError, ConfigError, PluginError
from kernel_core.manifest import ModelFamily
from kernel_core.nn.kv import AttentionChoice, Blocks, KVStore, attention_specs, choose_block_size, kv_groups
from kernel_core.nn.memory import activation_bytes, split_memory, weight_bytes
from kernel_core.nn.ops import Ops
from kernel_core.nn.protocols import (
    AttentionSpec,
    Device,
    Drafter,
    LayeredDrafter,
    MeasuringDevice,
    ModelContext,
    StepProbe,
    Target,
    WorkerContext,
)
from kernel_core.nn.reference_attention import ReferenceAttention
from kernel_core.nn.runner import PARTS, Pending, Runner
from kernel_core.plan import Allocation, Capabilities, StepPlan, StepResult, WorkerReport
from kernel_core.protocols import Call
from kernel_core.registry import Registry, find_family
from kernel_core.resolver import ResolvedPlan
from kernel_core.wire import encode

LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")
JOB = "job"  # the registered call that takes a plugin's jobs
logger = logging.getLogger("kernel_core")
EXPLAIN = "kernel.explain"  # the kernel's own call: which ops and attention backends were chosen


class Worker:
    """Made in the process of its rank; `rank` of `world_size`."""

    def __init__(self, plan: ResolvedPlan, model: ModelInfo, rank: int = 0, world_size: int = 1) -> None:
        self.plan, self.info, self.rank, self.world_size = plan, model, rank, world_size
        self.engine = plan.config.engine
        self.registry: Registry | None = None
        self.device: Device | None = None
        self.runner: Runner | None = None
        self.drafter: Drafter | None = None
        self._calls: dict[str, Call] = {}
        self._probes: list[StepProbe] = []
        self._timings: dict[str, float] = {}

    # ---- start

    def start(self) -> WorkerReport:
        """Open the device, build the model and load its weights, measure memory. Rate: build. Raises ConfigError,
        PluginError, CapacityError."""
        self.registry = Registry(self.plan, "worker", self.info)
        self.device = self._timed("device", self._open_device)
        self.capabilities = self.device.capabilities()
        self.dtype = choose_dtype(self.engine.dtype, self.info.config, self.capabilities)
        self.vocab_size = int(model_number(self.info.config, ("vocab_size",)))
        limit = self.engine.max_model_len
        self.made_for = int(model_number(self.info.config, LENGTH_KEYS, None if limit == "auto" else limit))
        self._size(self.engine.max_requests, self.made_for if limit == "auto" else limit, self.engine.max_tokens_per_step)
        self.block_size = choose_block_size(self.engine.block_size, self.capabilities, self.max_model_len)
        self.ops = Ops()
        self._all("register_ops", ops=self.ops)
        self.drafter = self._one("make_drafter")
        if self.drafter and self.drafter.tree and not self.capabilities.tree_attention:
            raise ConfigError("the drafter drafts trees, and this device has no tree attention: draft chains")
        self.model = self._timed("model", self._build_model)
        self.draft_model = self._timed("drafter", self._build_drafter) if self.drafter else None
        self._register_calls()
        models = {"model": self.model} | ({} if self.draft_model is None else {"drafter": self.draft_model})
        self.registry.call("watch_steps", self.context, models=models, probes=self._probes)
        return self._report()

    def _open_device(self) -> Device:
        answers = self.registry.call("make_device", rank=self.rank, world_size=self.world_size)
        if len(answers) != 1:
            raise PluginError(f"one device must answer make_device, got {[name for name, _ in answers]}")
        return answers[0][1]

    def _build_model(self) -> torch.nn.Module:
        from kernel_core.nn.loading import build_model

        offered = [b for _, backends in self._all("make_attention") for b in backends]
        reference = ReferenceAttention(self.device.torch_device)
        self.attention = AttentionChoice([*offered, reference], self.dtype, self.block_size)
        self.model_context = ModelContext(
            info=self.info,
            config=self.plan.config,
            dtype=self.dtype,
            device=self.device.torch_device,
            ops=self.ops,
            attention=self.attention,
            rank=self.rank,
            world_size=self.world_size,
            taps=tuple(self.drafter.taps) if self.drafter else (),
        )
        return build_model(find_family(self.info.architecture), self.model_context, _WorkerHooks(self.registry, self.context))

    def _build_drafter(self) -> torch.nn.Module | None:
        """The drafter's own layers, under paths of their own, so that they join the target's KV groups."""
        if not isinstance(self.drafter, LayeredDrafter):
            return None
        model, graphs = self.model, self.device.runner_parts().get("graphs", PARTS["graphs"])
        module = self.drafter.build(
            Target(
                self.info,
                self.model_context,
                model.embed,
                model.logits,
                self._find,
                self._load_for_drafter,
                graphs=lambda layers: graphs(layers, model),
            )
        )
        for layer in module.modules():
            if isinstance(getattr(layer, "spec", None), AttentionSpec):
                layer.spec = replace(layer.spec, layer=f"drafter.{layer.spec.layer}")
        return module

    def _find(self, name: str) -> ModelInfo:
        path = str(find_checkpoint(name))
        formats = [made for _, made in self.registry.call("make_checkpoint")]
        found = next((made for made in formats if made.recognises(path)), None)
        if found is None:
            raise ConfigError(f"no enabled plugin reads the checkpoint {path} (formats: {[made.format for made in formats]})")
        return found.inspect(path)

    def _load_for_drafter(self, info: ModelInfo, family: ModelFamily | None) -> torch.nn.Module:
        from kernel_core.nn.loading import build_model

        context = replace(self.model_context, info=info, taps=())
        hooks = _WorkerHooks(self.registry, self.context, wraps=False)
        return build_model(family or find_family(info.architecture), context, hooks)

    def _report(self) -> WorkerReport:
        specs = attention_specs(self.model)
        own = attention_specs(self.draft_model) if self.draft_model is not None else []
        self.draft_layers = frozenset(spec.layer for spec in own)
        specs += own
        unknown = {spec.kind for spec in specs} - set(self.capabilities.attention_kinds)
        if unknown:
            raise ConfigError(f"the model has {sorted(unknown)} attention, the device {self.capabilities.attention_kinds}")
        self.specs = specs
        self.groups = kv_groups(specs, self.attention, self.dtype, self.block_size)
        width, lookback = (self.drafter.width, self.drafter.lookback) if self.drafter else (0, 0)
        ahead = self.drafter.ahead if isinstance(self.drafter, LayeredDrafter) else 0
        sizes = (self.max_slots, self.max_model_len, self.max_tokens_per_step, width, ahead, lookback)
        activations = self._timed("largest step", lambda: self._activations(Allocation((2,) * len(self.groups), *sizes)))
        weights = weight_bytes(self.model) + (weight_bytes(self.draft_model) if self.draft_model is not None else 0)
        self.memory = split_memory(self.engine, self.device.memory(), weights, activations)
        return WorkerReport(
            groups=self.groups,
            kv_budget_bytes=self.memory.kv,
            capabilities=self.capabilities,
            vocab_size=self.vocab_size,
            max_model_len=self.made_for,
            draft_width=width,
            draft_ahead=ahead,
            lookback=lookback,
            drafter_needs_host=bool(self.drafter and self.drafter.needs_host),
            memory=self.memory.as_mapping(),
            timings=dict(self._timings),
        )

    def _activations(self, sizes: Allocation) -> int:
        """Bytes that the largest step takes: measured where the device can and KV gets what is left, else estimated."""
        chosen = self.engine.kv_memory is not None or self.engine.kv_blocks is not None
        if chosen or not isinstance(self.device, MeasuringDevice):
            rows = sizes.max_slots * (1 + sizes.draft_width)
            return activation_bytes(self.model, self.dtype, sizes.max_tokens_per_step, rows, self.vocab_size)

        return self.device.peak_memory(lambda: self._runner(sizes, self._kv(sizes)), sizes)

    # ---- allocate and run

    def allocate(self, allocation: Allocation) -> None:
        """Allocate KV and slots and assemble the runner. Rate: build. Raises CapacityError."""
        self._size(allocation.max_slots, allocation.max_model_len, allocation.max_tokens_per_step)
        kv = self._kv(allocation)
        transforms = [t for _, made in self._all("make_logits_transform") for t in made]
        self.runner = self._runner(allocation, kv, transforms=transforms, jobs=self._jobs(kv))

    def _kv(self, sizes: Allocation) -> KVStore:
        return KVStore(self.specs, self.groups, sizes.num_blocks, self.attention, self.dtype, self.device.torch_device)

    def _runner(self, sizes: Allocation, kv: KVStore, **options: Any) -> Runner:
        return Runner(
            self.model,
            kv,
            sizes,
            vocab_size=self.vocab_size,
            logprobs_mode=self.engine.logprobs_mode,
            step_inputs=[made for _, made in self._all("make_step_inputs")],
            drafter=self.drafter,
            draft_layers=self.draft_layers,
            parts=self.device.runner_parts(),
            **options,
        )

    def _jobs(self, kv: KVStore) -> dict[str, Callable[[bytes], Any]]:
        """By plugin, what takes its jobs."""
        jobs = {name.removesuffix("." + JOB): call for name, call in self._calls.items() if name.endswith("." + JOB)}
        if self.registry.hooks("make_block_store"):
            made = self.registry.call("make_block_store", self.context, blocks=Blocks(kv))
            jobs.update({plugin: store.job for plugin, store in made})
        return jobs

    def submit(self, plan: StepPlan) -> Pending:
        """Start a step. Where the device declares `async_submit` this returns while it runs. Rate: step. Raises CapacityError
        when the device has no memory for what comes before its forward; for the step itself, `Runner.submit` says it."""
        if self.runner is None:
            raise CapacityError("the worker has no KV yet: call allocate() before the first step")
        try:
            return self._probed(plan) if self._probes else self.runner.submit(plan)
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"no memory to begin a step of {len(plan.rows)} rows and {int(plan.q.sum())} tokens ({error}); "
                "lower engine.memory_fraction, engine.max_tokens_per_step or engine.max_requests"
            ) from error

    def _probed(self, plan: StepPlan) -> Pending:
        self._tell_probes(lambda probe: probe.begin(plan))
        pending = self.runner.submit(plan)
        self._tell_probes(lambda probe: probe.end(plan, pending.started, pending.timings))
        return pending

    def _tell_probes(self, verb: Callable[[StepProbe], None]) -> None:
        for probe in tuple(self._probes):
            try:
                verb(probe)
            except Exception:
                self._probes.remove(probe)
                logger.exception("the probe %s failed and is taken out", type(probe).__qualname__)

    def run(self, plan: StepPlan) -> StepResult:
        """Run a step to its end. Rate: step."""
        return self.submit(plan).result()

    def call(self, method: str, payload: bytes) -> bytes:
        """Run the registered call "plugin.name". Rate: rare, between steps. Raises PluginError for an unknown one."""
        handler = self._calls.get(method)
        if handler is None:
            raise PluginError(f"no enabled plugin registered the call {method!r}; there are {sorted(self._calls)}")
        return handler(payload)

    def close(self) -> None:
        """Let go of model, KV and device; idempotent."""
        self.runner = self.drafter = None
        self.model = self.draft_model = None
        self._probes.clear()
        registry, device = self.registry, self.device
        self.registry = self.device = None
        try:
            if registry is not None:
                registry.close()
        finally:
            if device is not None:
                device.close()

    # ---- contexts

    def _size(self, max_slots: int, max_model_len: int, max_tokens_per_step: int) -> None:
        self.max_slots, self.max_model_len, self.max_tokens_per_step = max_slots, max_model_len, max_tokens_per_step

    def context(self, plugin: str) -> WorkerContext:
        """The worker context of a plugin, with the sizes as far as they are settled."""
        base = self.registry.context(plugin)
        return WorkerContext(
            **{f.name: getattr(base, f.name) for f in fields(BuildContext)},
            device=self.device.torch_device,
            dtype=self.dtype,
            rank=self.rank,
            world_size=self.world_size,
            vocab_size=self.vocab_size,
            max_slots=self.max_slots,
            max_model_len=self.max_model_len,
            max_tokens_per_step=self.max_tokens_per_step,
            find=self._find,
            ops=self.ops,
        )

    def _all(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        return self.registry.call(hook, self.context, **arguments)

    def _one(self, hook: str) -> Any | None:
        return next((answer for _, answer in self._all(hook)), None)

    def _register_calls(self) -> None:
        self._calls = {EXPLAIN: self._explain}
        for plugin, calls in self.registry.call("register_calls"):
            self._calls.update({f"{plugin}.{name}": call for name, call in calls.items()})

    def _explain(self, payload: bytes) -> bytes:
        """What was chosen at build, as wire bytes: {"ops": [(op, owner, facts)], "attention": {layer: backend}}."""
        layers = {spec.layer: self.attention(spec).name for spec in self.specs}
        return encode({"ops": list(self.ops.explain()), "attention": layers})

    def _timed(self, name: str, function: Callable[[], Any]) -> Any:
        start = perf_counter()
        result = function()
        self._timings[name] = perf_counter() - start
        return result


class _WorkerHooks:
    """The registry as the loader uses it: hooks get worker contexts."""

    def __init__(self, registry: Registry, context: Callable[[str], WorkerContext], wraps: bool = True) -> None:
        self._registry, self._context, self._wraps = registry, context, wraps

    def call(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        return self._registry.call(hook, self._context, **arguments)

    def chain(self, hook: str) -> list[Callable[..., Any]]:
        """Each plugin's implementation with its own context, in order; for callers that thread a value through."""
        found = self._registry.hooks(hook) if self._wraps else {}
        return [partial(implementation, context=self._context(plugin)) for plugin, implementation in found.items()]


def model_number(config: Mapping[str, Any], names: tuple[str, ...], default: Any = None) -> Any:
    """The first of `names` that the checkpoint's config (or its text part) states. Raises ConfigError without a default."""
    for part in (config, config.get("text_config") or {}):
        for name in names:
            if part.get(name) is not None:
                return part[name]
    if default is None:
        raise ConfigError(f"the checkpoint's config.json states none of {names}; set engine.max_model_len")
    return default


def choose_dtype(asked: str, config: Mapping[str, Any], capabilities: Capabilities) -> torch.dtype:
    """The compute dtype: as asked, or the checkpoint's where the device has it, else the nearest it has, else float32."""
    if asked != "auto":
        if asked not in capabilities.dtypes:
            raise ConfigError(f"engine.dtype = {asked!r}: this device computes in {capabilities.dtypes}")
        return getattr(torch, asked)
    text = config.get("text_config") or {}
    stated = next((c[k] for c in (config, text) for k in ("dtype", "torch_dtype") if c.get(k)), "float32")
    stated = str(stated).removeprefix("torch.")
    half = ("bfloat16", "float16") if stated != "float32" else ()
    for name in (stated, *half, "float32"):
        if name in capabilities.dtypes:
            return getattr(torch, name)
    return getattr(torch, capabilities.dtypes[0])
