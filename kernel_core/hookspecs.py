# pyright: reportReturnType=false
# Docstrings are the bodies here.
"""The hooks. pluggy validates and registers implementations; the kernel calls them at build time, one plugin at a time in
resolved order, each with its own context, and prebinds what they return. Nothing here is called in a step.

A hook without a caller is not listed; docs/architecture.md says where the others will attach.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy

if TYPE_CHECKING:
    from types import ModuleType

    from kernel_core.config import KernelConfig
    from kernel_core.contexts import BuildContext, EngineContext
    from kernel_core.manifest import Constraint
    from kernel_core.nn.protocols import (
        AttentionBackend,
        BlockAccess,
        BlockStore,
        Device,
        Drafter,
        LogitsTransform,
        OpRegistry,
        StepInputs,
        StepProbe,
        WeightFormat,
        WorkerContext,
    )
    from kernel_core.protocols import (
        Call,
        CheckpointFormat,
        Connector,
        Executor,
        Observer,
        Policy,
        PrefixIndex,
        RequestPreparer,
        Resource,
        Verb,
    )

PROJECT = "kernel_core"
F = TypeVar("F", bound=Callable[..., Any])
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


def home(*parts: str, composes: str) -> Callable[[F], F]:
    """Mark where a hook is called ("face", "engine", "worker") and how several answers compose."""

    def mark(function: F) -> F:
        function.__dict__.update(parts=parts, composes=composes)
        return function

    return mark


@hookspec
@home("face", composes="all")
def constrain(config: KernelConfig, section: Any) -> Sequence[Constraint]:
    """State what this plugin needs of the configuration.

    Pure: reads the user's configuration and its own section, returns constraints, changes nothing. Called until nothing
    changes, before anything is built and before torch is imported."""


@hookspec
@home("face", "engine", "worker", composes="all")
def add_hookspecs() -> ModuleType:
    """Name a module with hook specifications of this plugin's own, each marked `@hookspec` and `@home(...)` and taking `context`.

    Other plugins implement them with `@hookimpl(optionalhook=True)`, so that they also work where this one is absent; this
    plugin calls them by `BuildContext.ask`."""


@hookspec
@home("face", composes="all")
def register_verbs(context: BuildContext) -> Mapping[str, Verb]:
    """Methods that `LLM` gains: {"name": function}. The function is given `call`, a synchronous `Executor.call` that also
    reaches the engine part, and then the user's arguments.

    Two plugins registering one verb, or one that `LLM` has, is a start-up error."""


@hookspec
@home("face", composes="all")
def register_fields() -> Mapping[str, type]:
    """Name the request fields that this plugin reads: {"request": a pydantic model whose fields are request fields, "output": a
    pydantic model of named outputs}; either may be left out.

    Two plugins registering one field is a start-up error naming both."""


@hookspec
@home("engine", "worker", composes="all")
def register_calls(context: BuildContext) -> Mapping[str, Call]:
    """Calls that any process may make: {"name": bytes → bytes}, reached as "plugin.name" through the faces' `call`, run between
    two steps. Those of the worker part (`context.part`) run on every rank, one answer each; those of the engine part in the
    engine's thread, while steps may be in flight. A name belongs to one of the two."""


@hookspec
@home("face", composes="chain")
def prepare_request(context: BuildContext) -> RequestPreparer:
    """Make the object that turns this plugin's request fields into payloads, spans, identity, jobs, gates and resources."""


@hookspec
@home("face", composes="all")
def make_service(context: BuildContext, name: str) -> Any:
    """Build the provider of a service this plugin's manifest provides ("text/1"). The requirer's Protocol is checked."""


@hookspec
@home("engine", composes="chain")
def make_policy(context: EngineContext) -> Policy:
    """Replace first-come-first-served: sort key, chunk size, victim.

    Of several policies the keys compare in resolved order, the smallest chunk counts, and the first names the victim."""


@hookspec
@home("engine", composes="all")
def make_resource(context: EngineContext) -> Resource:
    """Add something bounded that requests hold while they have a slot."""


@hookspec
@home("engine", composes="exclusive")
def make_prefix_index(context: EngineContext) -> PrefixIndex | None:
    """Find the KV of tokens that were computed before. None: there is nothing to find with these KV groups."""


@hookspec
@home("engine", composes="exclusive")
def make_connector(context: EngineContext) -> Connector | None:
    """Keep the KV blocks that a prefix index evicts somewhere else, and bring them back."""


@hookspec
@home("engine", composes="exclusive")
def make_executor(context: BuildContext, plan: bytes) -> Executor:
    """Run workers somewhere else than in this process. Chosen by `executor = "<plugin>"` or by being the only one enabled.

    `plan` is the frozen plan as JSON: what `kernel_core.nn.api.open_worker` needs in the process of each rank."""


@hookspec
@home("face", "worker", composes="keyed")
def make_checkpoint(context: BuildContext) -> CheckpointFormat:
    """Read one checkpoint format."""


@hookspec
@home("engine", composes="all")
def make_observer(context: EngineContext) -> Observer:
    """Watch steps and requests. What is measured is read by a registered call of the engine part, through `context.shared`."""


@hookspec
@home("worker", composes="exclusive")
def make_device(context: BuildContext, rank: int, world_size: int) -> Device:
    """Open the device. Only called on the plugin that `device = "..."` selected."""


@hookspec
@home("engine", composes="all")
def probe_device(section: Any) -> str | None:
    """Can this device run here? None: yes; otherwise the reason why not, in one line. Called by `device = "auto"`; may
    import nothing heavy and create no device context."""


@hookspec
@home("worker", composes="all")
def register_ops(context: WorkerContext, ops: OpRegistry) -> None:
    """Register implementations of semantic ops, each with a predicate and a priority. A plugin may add ops of its own, with a
    reference of priority -1, and take what is best for the device from `context.ops` in the hooks that come later."""


@hookspec
@home("worker", composes="all")
def make_block_store(context: WorkerContext, blocks: BlockAccess) -> BlockStore:
    """The worker part of a connector: takes its jobs, and reads and writes KV blocks. Called once KV is allocated."""


@hookspec
@home("worker", composes="keyed")
def make_attention(context: WorkerContext) -> Sequence[AttentionBackend]:
    """Offer attention backends; the highest priority whose `supports(spec)` holds is taken per layer, at build."""


@hookspec
@home("worker", composes="keyed")
def make_weight_format(context: WorkerContext) -> WeightFormat:
    """Replace the parameters of linears before weights are loaded (quantised checkpoints and online quantisation)."""


@hookspec
@home("worker", composes="chain")
def wrap_module(context: WorkerContext, path: str, module: Any) -> Any | None:
    """Return a module to put in the place of `module` (a parallel layer, after weight formats), or None to leave it."""


@hookspec
@home("worker", composes="one owner a name")
def make_step_inputs(context: WorkerContext) -> StepInputs:
    """Declare named device inputs and fill them once per step."""


@hookspec
@home("worker", composes="chain")
def make_logits_transform(context: WorkerContext) -> Sequence[LogitsTransform]:
    """Change logits before sampling, in one of the four stages mask, bias, penalty, temperature. Sampling rank only."""


@hookspec
@home("worker", composes="exclusive")
def make_drafter(context: WorkerContext) -> Drafter:
    """Propose draft tokens after each step; the kernel verifies them."""


@hookspec
@home("worker", composes="all")
def watch_steps(context: WorkerContext, models: Mapping[str, Any], probes: list[StepProbe]) -> None:
    """Learn of the loaded modules ("model", and "drafter" where it has layers) and of where probes go. A plugin puts a probe into
    `probes` to measure steps and takes it out again, both between two steps (from a registered call); without one a step
    costs nothing. Called once a rank, when the weights are loaded."""
