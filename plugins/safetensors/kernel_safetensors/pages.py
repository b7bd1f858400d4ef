"""Gives back the memory of file pages that were read: a loaded checkpoint is then not held twice."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

ADVICE = getattr(mmap, "MADV_DONTNEED", None)


class MappedFile:
    """Where a file is mapped into this process, as /proc/self/maps says; nowhere on systems without it."""

    def __init__(self, file: Path) -> None:
        maps, name = Path("/proc/self/maps"), str(file.resolve())
        lines = maps.read_text().splitlines() if ADVICE is not None and maps.is_file() else []
        ranges = [line.split()[0].split("-") for line in lines if line.endswith(name)]
        self.ranges = [(int(begin, 16), int(end, 16)) for begin, end in ranges]

    def drop(self, address: int, size: int) -> None:
        """Let go of the whole pages of [address, address + size) that are mapped from the file; reading them again brings them
        back from the page cache. What was written to them in place would be lost, so nobody may: the tensors are read-only."""
        for first, last in self.ranges:
            begin = -(-max(first, address) // mmap.PAGESIZE) * mmap.PAGESIZE
            end = min(last, address + size) // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end and ctypes.CDLL(None, use_errno=True).madvise(
                ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ADVICE
            ):
                raise OSError(ctypes.get_errno(), f"madvise failed on {end - begin} bytes of a mapped checkpoint")
