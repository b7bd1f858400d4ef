# ruff: noqa: F401
"""Everything a plugin may import from the kernel without torch. The faces are loaded when they are first used: light
entry-point modules import this module, and must stay light."""

from importlib import import_module as _import
from typing import TYPE_CHECKING as _CHECKING

from kernel_core.config import EngineConfig, KernelConfig
from kernel_core.contexts import BuildContext, EngineContext, ModelInfo
from kernel_core.discovery import Found, Installed, install_hint, load, profile, profile_data
from kernel_core.errors import CapacityError, ConfigError, EngineDeadError, KernelError, PluginError, RequestError
from kernel_core.hookspecs import home, hookimpl, hookspec
from kernel_core.manifest import API_VERSION, Command, Constraint, Manifest, ModelFamily, Section
from kernel_core.plan import (
    LOGPROBS_MODES,
    NO_PREFIX_READ,
    NO_PREFIX_WRITE,
    NO_TOKEN,
    PROMPT_LOGPROBS,
    Ack,
    Allocation,
    Capabilities,
    Job,
    KVGroup,
    Logprobs,
    Opened,
    SamplingRow,
    Span,
    StepPlan,
    StepResult,
    WorkerReport,
)
from kernel_core.protocols import (
    Arrival,
    CheckpointFormat,
    Connector,
    Executor,
    Handle,
    Observer,
    Policy,
    PrefixHit,
    PrefixIndex,
    PrefixRequest,
    Prepared,
    RequestPreparer,
    RequestView,
    Resource,
    StepRecord,
    TextCodec,
    TextStream,
    Verb,
)
from kernel_core.request import CompletionOutput, DraftCounts, Logprob, Request, RequestOutput, SamplingParams, Updates
from kernel_core.wire import decode, encode

if _CHECKING:
    from kernel_core.assembly import EnginePart, Face, inspect_model, open_engine, open_face
    from kernel_core.async_engine import AsyncEngine
    from kernel_core.enabling import configure
    from kernel_core.engine import Engine, EngineFacts, find_verb
    from kernel_core.intake import Accepted, Intake
    from kernel_core.llm import LLM
    from kernel_core.outputs import Outputs
    from kernel_core.resolver import ResolvedPlan, resolve
    from kernel_core.sampling_arguments import add_sampling_arguments, sampling_from_arguments
    from kernel_core.settings import config_from_arguments

_FACES = {
    "assembly": "EnginePart Face inspect_model open_engine open_face",
    "async_engine": "AsyncEngine",
    "enabling": "configure",
    "engine": "Engine EngineFacts find_verb",
    "intake": "Accepted Intake",
    "llm": "LLM",
    "outputs": "Outputs",
    "resolver": "ResolvedPlan resolve",
    "sampling_arguments": "add_sampling_arguments sampling_from_arguments",
    "settings": "config_from_arguments",
}
_HOME_OF = {name: module for module, names in _FACES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(_import(f"kernel_core.{_HOME_OF[name]}"), name)


__all__ = [name for name in (*dir(), *_HOME_OF) if not name.startswith("_")]
