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
from kernel_core.nn.transfer import Download, upload, upload_columns
from kernel_core.nn.transforms import mask_bits
from kernel_core.nn.verify import Acceptance, Verified


def open_worker(plan: bytes, model: ModelInfo, rank: int = 0, world_size: int = 1) -> Rank:
    """The worker of one rank, not started; `plan` is what `make_executor` was given. For executors, in the rank's process."""
    from kernel_core.nn.worker import Worker
    from kernel_core.resolver import ResolvedPlan

    return Worker(ResolvedPlan.from_json(plan), model, rank, world_size)


__all__ = [
    "Acceptance",
    "activation_op",
    "Attention",
    "AttentionBackend",
    "AttentionBatch",
    "AttentionShape",
    "AttentionSpec",
    "BlockAccess",
    "BlockStore",
    "Decoder",
    "DECODER_WEIGHTS",
    "DecoderConfig",
    "DecoderLayer",
    "Device",
    "Download",
    "DraftBatch",
    "Drafter",
    "Drafting",
    "DraftLength",
    "DraftOutcome",
    "DraftPasses",
    "DraftView",
    "draw",
    "draw_among",
    "Forward",
    "gated_op",
    "GatedMLP",
    "HeadPreparation",
    "HostTurn",
    "layer_types",
    "layer_windows",
    "LayeredDrafter",
    "LayerNorm",
    "layout",
    "Layout",
    "Linear",
    "LogitsHead",
    "LogitsTransform",
    "LogprobColumns",
    "LongJob",
    "mask_bits",
    "MeasuringDevice",
    "MemoryReport",
    "Model",
    "ModelContext",
    "MoE",
    "MoEShape",
    "open_worker",
    "OpRegistry",
    "Output",
    "Passes",
    "PreparedOp",
    "Rank",
    "read_decoder",
    "read_rope",
    "required",
    "RMSNorm",
    "RopeConfig",
    "Rotary",
    "Sampled",
    "Sampler",
    "SlotTable",
    "Step",
    "StepInputBuilder",
    "StepInputs",
    "StepProbe",
    "StepView",
    "Taps",
    "Target",
    "UnknownPart",
    "upload",
    "upload_columns",
    "Verified",
    "VocabEmbedding",
    "WeightFormat",
    "Weights",
    "WorkerContext",
]
