"""Can this process use an NVIDIA GPU? Asked before torch is imported, without making a CUDA context."""

from __future__ import annotations

import ctypes
import os
from importlib.metadata import PackageNotFoundError, version


def why_not() -> str | None:
    """None: a GPU, its driver and the packages are there. Else what is missing, in a sentence."""
    return _hidden() or _packages() or _driver()


def _hidden() -> str | None:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "CUDA_VISIBLE_DEVICES hides every GPU" if visible is not None and visible.strip() in ("", "-1") else None


def _packages() -> str | None:
    try:
        torch = version("torch")
        version("triton")
    except PackageNotFoundError as error:
        return f"the package {error.name} is not installed"
    if "+cpu" in torch:
        return f"the installed torch {torch} is a build without CUDA; install one from PyPI"
    return None


def _driver() -> str | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return "no NVIDIA driver is installed (libnvidia-ml.so.1 is not found)"
    if code := nvml.nvmlInit_v2():
        return f"the NVIDIA driver does not answer (NVML error {code})"
    count = ctypes.c_uint()
    code = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return None if not code and count.value else "the NVIDIA driver sees no GPU"
