"""CPU time and memory of this process tree and of everybody else, from /proc. Standard library only."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")


def _stat(pid: str) -> tuple[int, float]:
    """(parent, CPU seconds) of a process, its own threads included."""
    fields = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), sum(map(int, fields[11:15])) / TICK


def tree() -> Iterator[tuple[str, float]]:
    """(pid, CPU seconds) of this process and its descendants."""
    parents, seconds = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[path.name], seconds[path.name] = _stat(path.name)
        except (OSError, IndexError):
            continue  # it ended meanwhile
    ours = {str(os.getpid())}
    grown = True
    while grown:
        grown = False
        for pid, parent in parents.items():
            if str(parent) in ours and pid not in ours:
                ours.add(pid)
                grown = True
    return ((pid, seconds[pid]) for pid in ours if pid in seconds)


def peak_memory() -> int:
    """Bytes: the largest resident sizes that the processes of the tree ever had, added up."""
    total = 0
    for pid, _ in tree():
        status = Path("/proc", pid, "status").read_text()
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return total


@dataclass(frozen=True)
class Load:
    """Cores busy on average: with this process tree, and with everybody else."""

    own: float
    foreign: float


class LoadMeter:
    """Measures from its making to `read`."""

    def __init__(self) -> None:
        self._start, self._own, self._busy = time.monotonic(), self._own_seconds(), self._busy_seconds()

    def _own_seconds(self) -> float:
        return sum(seconds for _, seconds in tree())

    def _busy_seconds(self) -> float:
        """Of the whole machine: user, nice, system, irq, softirq, steal."""
        values = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]))
        return (sum(values[:3]) + sum(values[5:8])) / TICK

    def read(self) -> Load:
        seconds = max(time.monotonic() - self._start, 1e-6)
        own = self._own_seconds() - self._own
        busy = self._busy_seconds() - self._busy
        return Load(round(own / seconds, 3), round(max(busy - own, 0.0) / seconds, 3))
