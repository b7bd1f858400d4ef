"""Reads checkpoints in Hugging Face format. This module is light; torch is imported when weights are read."""

from __future__ import annotations

from kernel_core.api import BuildContext, CheckpointFormat, Manifest, hookimpl

manifest = Manifest(name="safetensors", summary="Reads Hugging Face checkpoints with safetensors weights")


@hookimpl
def make_checkpoint(context: BuildContext) -> CheckpointFormat:
    from kernel_safetensors.checkpoint import SafetensorsCheckpoint

    return SafetensorsCheckpoint()
