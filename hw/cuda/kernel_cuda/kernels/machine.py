"""What launches ask of the device."""

from __future__ import annotations

from functools import cache

import torch


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; for other tensors (the interpreter's, or none at all) those of an H100."""
    if device.type != "cuda":
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have, by compute capability (CUDA programming guide, specifications)."""
    major, minor = capability(device)
    if major in (9, 10) or (major, minor) == (0, 0):
        return 227 << 10
    return 163 << 10 if (major, minor) in ((8, 0), (8, 7)) else 99 << 10
