"""Provides the service "text/1": a tokenizer, incremental text with stop strings, and chat templates."""

from __future__ import annotations

from kernel_core.api import BuildContext, Manifest, TextCodec, hookimpl

manifest = Manifest(
    name="text",
    summary="Tokens to text and back: tokenizers, incremental detokenisation, stop strings, chat templates",
    provides=("text/1",),
)


@hookimpl
def make_service(context: BuildContext, name: str) -> TextCodec:
    from kernel_text.codec import Codec

    return Codec(context.model, trust_code=context.config.trust_code)
