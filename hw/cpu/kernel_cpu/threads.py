"""How many threads the kernels use. The pool is created on first use, in each process anew (fork and spawn alike)."""

from __future__ import annotations

import math
import os
from pathlib import Path

from kernel_cpu import build


def available_cores() -> int:
    """Cores this process may use: its affinity mask, cut down to the cgroup's CPU quota (at least 1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota()))


def _quota() -> int:
    """The cgroup quota in whole cores, rounded up; a large number without one."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            limit = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").read_text().strip()
            period = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us").read_text().strip()
        except OSError:
            return 1 << 20
    return math.ceil(int(limit) / int(period)) if limit.lstrip("-").isdigit() and int(limit) > 0 else 1 << 20


def set_num_threads(count: int | None = None) -> None:
    """Sets the threads that kernels run on, the calling one included; None means ``available_cores()``.

    Call it between kernels, not while another thread runs one. Raises ValueError for a count below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"threads must be at least 1, not {count}")
    if kernels := build.library():
        kernels.kc_set_threads(count or available_cores())


def num_threads() -> int:
    """Threads that kernels run on."""
    kernels = build.library()
    return kernels.kc_threads() if kernels else available_cores()
