"""The CUDA device: Triton kernels, CUDA graphs, an overlapped loop. This module is light: its hooks import what they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from kernel_core.api import BuildContext, Manifest, Section, hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernel_core.nn.api import AttentionBackend, Device, OpRegistry, WorkerContext


class CudaSection(Section):
    """`[plugins.cuda]`. graphs: decode steps of up to `graph_rows` requests are captured into CUDA graphs, each on its first
    use. kv_dtype "fp8": KV is kept as e4m3 numbers with a scale per token and head, in half the memory.

    Off, because they have run in emulation only: model_graphs, the model of other steps of up to `graph_rows` tokens (drafts,
    masks, penalties, logprobs) is captured, and of those steps with prompts that the host would launch for longer than the GPU
    computes, each on its second use (needs `graphs`); fused_steps, what such steps compute around the model is a few kernels of
    our own instead of some hundred small ones; mixed_flash, in steps that are not all whole prompts rows of prompts go through
    torch's flash attention."""

    graphs: bool = True
    model_graphs: bool = False
    fused_steps: bool = False
    mixed_flash: bool = False
    graph_rows: int = Field(512, ge=1)
    kv_dtype: Literal["auto", "fp8"] = "auto"


manifest = Manifest(
    name="cuda", summary="NVIDIA GPUs: Triton kernels, CUDA graphs, overlapped steps", before=("cpu",), section=CudaSection
)


@hookimpl
def probe_device(section: CudaSection) -> str | None:
    from kernel_cuda.probe import why_not

    return why_not()


@hookimpl
def make_device(context: BuildContext, rank: int, world_size: int) -> Device:
    from kernel_cuda.device import CudaDevice

    return CudaDevice(context.section, rank)


@hookimpl
def register_ops(context: WorkerContext, ops: OpRegistry) -> None:
    from kernel_cuda.ops import register, register_history

    register(ops)
    if context.section.fused_steps:
        register_history(ops)


@hookimpl
def make_attention(context: WorkerContext) -> Sequence[AttentionBackend]:
    from kernel_cuda.attention import CudaAttention

    section = context.section
    return (CudaAttention(context.device, context.dtype, fp8=section.kv_dtype == "fp8", mixed=section.mixed_flash),)
