"""Everything a plugin may import from the kernel without torch."""

from kernel_core.config import EngineConfig, KernelConfig
from kernel_core.contexts import BuildContext, EngineContext, ModelInfo
from kernel_core.errors import CapacityError, ConfigError, EngineDeadError, KernelError, PluginError, RequestError
from kernel_core.hookspecs import hookimpl
from kernel_core.manifest import API_VERSION, Command, Constraint, Manifest, ModelFamily, Section
from kernel_core.plan import (
    LOGPROBS_MODES,
    NO_TOKEN,
    Ack,
    Allocation,
    Capabilities,
    Job,
    KVGroup,
    Opened,
    SamplingRow,
    Span,
    StepPlan,
    StepResult,
    WorkerReport,
)
from kernel_core.protocols import (
    CheckpointFormat,
    Executor,
    Handle,
    Observer,
    Policy,
    Prepared,
    RequestPreparer,
    RequestView,
    Resource,
    StepRecord,
    TextCodec,
    TextStream,
)
from kernel_core.request import (
    CompletionOutput,
    Logprob,
    Request,
    RequestOutput,
    SamplingParams,
    Updates,
)
from kernel_core.wire import decode, encode

__all__ = [name for name in dir() if not name.startswith("_")]
