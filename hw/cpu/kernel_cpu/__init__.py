"""The CPU device. Its kernels are C++, compiled on first use. This module is light: its hooks import what they need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from kernel_core.api import BuildContext, Manifest, Section, hookimpl

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernel_core.nn.api import AttentionBackend, Device, OpRegistry, WorkerContext


class CpuSection(Section):
    """`[plugins.cpu]`. kernels: "auto" compiles the C++ kernels on first use and says so when it cannot; "compiled" makes
    a missing compiler an error; "torch" never compiles. kv_share: the share of free memory that KV may take when the user
    set neither `kv_memory` nor `kv_blocks` (host memory is shared with other programs). replay: decode steps of few requests
    are recorded once as lists of kernel calls."""

    kernels: Literal["auto", "compiled", "torch"] = "auto"
    kv_share: float = 0.25
    replay: bool = True


manifest = Manifest(name="cpu", summary="The CPU device", after=("*",), section=CpuSection)


@hookimpl
def probe_device(section: Any) -> str | None:
    return None


@hookimpl
def make_device(context: BuildContext, rank: int, world_size: int) -> Device:
    from kernel_cpu.device import CpuDevice

    section = context.section
    return CpuDevice(section.kernels, section.kv_share, context.config.engine.threads, section.replay)


@hookimpl
def register_ops(context: WorkerContext, ops: OpRegistry) -> None:
    from kernel_cpu.ops import register, register_history

    register(ops)
    register_history(ops)


@hookimpl
def make_attention(context: WorkerContext) -> Sequence[AttentionBackend]:
    from kernel_cpu.backend import PagedAttention

    return (PagedAttention(),)
