"""Everything a plugin's torch side may import from the worker kernel."""

from kernel_core.contexts import ModelInfo
from kernel_core.nn.decoder import (
    DECODER_WEIGHTS,
    Decoder,
    DecoderConfig,
    DecoderLayer,
    Taps,
    layer_types,
    layer_windows,
    read_decoder,
    required,
)
from kernel_core.nn.draft_length import DraftLength, DraftOutcome
from kernel_core.nn.draws import draw, draw_among
from kernel_core.nn.inputs import Layout, Step, StepInputBuilder, layout
from kernel_core.nn.layers import (
    Attention,
    AttentionShape,
    GatedMLP,
    LayerNorm,
    Linear,
    LogitsHead,
    Output,
    RMSNorm,
    UnknownPart,
    VocabEmbedding,
    activation_op,
    gated_op,
)
from kernel_core.nn.logprobs import LogprobColumns
from kernel_core.nn.moe import MoE, MoEShape
from kernel_core.nn.ops import PreparedOp
from kernel_core.nn.passes import Drafting, Passes
from kernel_core.nn.protocols import (
    AttentionBackend,
    AttentionBatch,
    AttentionSpec,
    BlockAccess,
    BlockStore,
    Device,
    DraftBatch,
    Drafter,
    DraftPasses,
    DraftView,
    Forward,
    HeadPreparation,
    HostTurn,
    LayeredDrafter,
    LogitsTransform,
    LongJob,
    MeasuringDevice,
    MemoryReport,
    Model,
    ModelContext,
    OpRegistry,
    Rank,
    StepInputs,
    StepProbe,
    StepView,
    Target,
    WeightFormat,
    Weights,
    WorkerContext,
)
from kernel_core.nn.rope import RopeConfig, Rotary, read_rope
from kernel_core.nn.sampler import Sampled, Sampler
from kernel_core.nn.slots import SlotTable
from kernel_core.nn.transfer import upload
from kernel_core.nn.transforms import mask_bits
from kernel_core.nn.verify import Acceptance, Verified


def open_worker(plan: bytes, model: ModelInfo, rank: int = 0, world_size: int = 1) -> Rank:
    """The worker of one rank, not started; `plan` is what `make_executor` was given. For executors, in the rank's process."""
    from kernel_core.nn.worker import Worker
    from kernel_core.resolver import ResolvedPlan

    return Worker(ResolvedPlan.from_json(plan), model, rank, world_size)


__all__ = [
    "mask_bits",
    "LogprobColumns",
    "SlotTable",
    "Verified",
    "Acceptance",
    "Sampled",
    "Passes",
    "Drafting",
    "layout",
    "StepInputBuilder",
    "Step",
    "Layout",
    "Attention",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionShape",
    "AttentionSpec",
    "BlockAccess",
    "BlockStore",
    "DECODER_WEIGHTS",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "Device",
    "DraftBatch",
    "DraftLength",
    "DraftOutcome",
    "DraftPasses",
    "DraftView",
    "Drafter",
    "Forward",
    "HeadPreparation",
    "GatedMLP",
    "HostTurn",
    "LayerNorm",
    "LayeredDrafter",
    "Linear",
    "LogitsHead",
    "LogitsTransform",
    "LongJob",
    "MeasuringDevice",
    "MemoryReport",
    "MoE",
    "MoEShape",
    "Model",
    "ModelContext",
    "OpRegistry",
    "Output",
    "PreparedOp",
    "RMSNorm",
    "Rank",
    "RopeConfig",
    "Rotary",
    "Sampler",
    "StepInputs",
    "StepProbe",
    "StepView",
    "Taps",
    "Target",
    "UnknownPart",
    "VocabEmbedding",
    "WeightFormat",
    "Weights",
    "WorkerContext",
    "activation_op",
    "draw",
    "draw_among",
    "gated_op",
    "layer_types",
    "layer_windows",
    "open_worker",
    "read_decoder",
    "read_rope",
    "required",
    "upload",
]
