"""The opened device: what it can do, how much memory there is, and its threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from kernel_core.api import Capabilities, PluginError
from kernel_core.nn.api import MemoryReport
from kernel_cpu import build, threads
from kernel_cpu.replay import Replay
from kernel_cpu.sampling import HostSampler, mask_bits, one_thread
from kernel_cpu.steady import SteadySteps
from kernel_cpu.steps import HostAcceptance, HostDrafting, HostInputs


class CpuDevice:
    """One process's share of the machine. Opening it sets the threads of the kernels and of torch.

    Raises PluginError when compiled kernels were asked for and no compiler works."""

    name = "cpu"
    torch_device = torch.device("cpu")

    def __init__(self, kernels: str, kv_share: float, num_threads: int | None, replay: bool = True) -> None:
        if kernels == "torch":
            build.disable()
        elif build.library() is None and kernels == "compiled":
            raise PluginError(f'[plugins.cpu] kernels = "compiled": {build.MISSING}')
        self._kv_share, self._replays = kv_share, replay and build.library() is not None
        count = num_threads or threads.available_cores()
        threads.set_num_threads(count)
        torch.set_num_threads(count)

    def capabilities(self) -> Capabilities:
        return Capabilities(
            dtypes=("float32", "bfloat16"),
            block_sizes=(16, 32, 64, 128),
            same_step_reads=True,
            graph_mode="decode" if self._replays else "none",
        )

    def memory(self) -> MemoryReport:
        total, free = _host_memory()
        return MemoryReport(total, free, kv_limit=int(free * self._kv_share))

    def runner_parts(self) -> Mapping[str, Callable[..., Any]]:
        parts: dict[str, Callable[..., Any]] = {"sampler": HostSampler, "mask": lambda: mask_bits, "small_ops": one_thread}
        parts |= {"step_inputs": HostInputs, "acceptance": HostAcceptance, "drafting": HostDrafting, "steady": SteadySteps}
        return parts | {"graphs": Replay} if self._replays else parts

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        pass


def _host_memory() -> tuple[int, int]:
    """(total, available) bytes of the machine, cut down to the cgroup's limit."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = page * os.sysconf("SC_PHYS_PAGES")
    free = _meminfo("MemAvailable") or page * os.sysconf("SC_AVPHYS_PAGES")
    limit, used = (_number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        total, free = limit, min(free, max(0, limit - (used or 0)))
    return total, free


def _meminfo(key: str) -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), None)


def _number(path: Path) -> int | None:
    """The number a cgroup file holds; None for "max" or where there is no such file."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
