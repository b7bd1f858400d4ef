"""Importing this makes every look at `torch.cuda` from the kernel or a plugin raise; torch's own use goes through.

Also a pytest plugin: `pytest -p poisoned_cuda`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import torch

GUARDED = ("kernel_core", "kernel_")
_real = torch.cuda


class PoisonedCuda(ModuleType):
    """Stands in the place of torch.cuda."""

    def __getattr__(self, name: str) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(GUARDED):
            raise RuntimeError(f"{caller} reads torch.cuda.{name}: ask the device plugin instead")
        return getattr(_real, name)


torch.cuda = sys.modules["torch.cuda"] = PoisonedCuda("torch.cuda")
