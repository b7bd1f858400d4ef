"""Checkpoints in the Hugging Face layout."""

from __future__ import annotations

from kernel_core.api import BuildContext, CheckpointFormat, Manifest, hookimpl

manifest = Manifest(name="safetensors", summary="checkpoints in safetensors files")


@hookimpl
def make_checkpoint(context: BuildContext) -> CheckpointFormat:
    from kernel_safetensors.checkpoint import Safetensors

    return Safetensors(weights_needed=not context.config.engine.random_weights)
