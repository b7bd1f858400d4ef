"""The CUDA device. This module is light: its hooks import what they need."""

from __future__ import annotations

from typing import Any

from kernel_core.api import Manifest, hookimpl

manifest = Manifest(name="cuda", summary="The CUDA device", after=("*",))


@hookimpl
def probe_device(section: Any) -> str | None:
    return "the CUDA device is not complete yet"
