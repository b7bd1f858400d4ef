"""Speculation with a draft model: a smaller causal LM drafts chains; https://arxiv.org/abs/2211.17192."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kernel_core.api import Manifest, Section, hookimpl

if TYPE_CHECKING:
    from kernel_core.nn.api import LayeredDrafter, WorkerContext


class DraftModelSection(Section):
    """`[plugins.draft_model]`."""

    model: str = Field(description="the draft model: a directory, a hub id or an embedded name, of any installed family")
    draft_tokens: int = Field(default=4, ge=1, le=32, description="most drafts a step")
    adaptive: bool = Field(default=True, description="draft as many as pay, by measured acceptance and step times")
    heterogeneous_vocabulary: bool = Field(
        default=False, description="take a draft model with another vocabulary, and draft the tokens that both have"
    )


manifest = Manifest(name="draft_model", summary="drafts by a smaller model", section=DraftModelSection)


@hookimpl
def make_drafter(context: WorkerContext) -> LayeredDrafter:
    from kernel_draft_model.drafter import ModelDrafter

    return ModelDrafter(context.section, context)
