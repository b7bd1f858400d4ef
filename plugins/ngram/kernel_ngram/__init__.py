"""Drafts from the request's own tokens: what followed the last time that the text went like this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from kernel_core.api import Manifest, Section, hookimpl

if TYPE_CHECKING:
    from kernel_core.nn.api import Drafter, OpRegistry, WorkerContext


class NgramSection(Section):
    """`[plugins.ngram]`."""

    method: Literal["lookup", "suffix"] = Field(
        default="lookup",
        description="lookup: the most recent n-gram like the last one, on the device; suffix: the longest suffix that occurred"
        " before, of any length, by a suffix automaton on the host",
    )
    draft_tokens: int = Field(default=4, ge=1, le=32, description="most drafts a step")
    min_ngram: int = Field(default=2, ge=1, description="shortest match that is followed")
    max_ngram: int = Field(default=4, ge=1, description="longest match that is looked for; lookup only")
    adaptive: bool = Field(default=True, description="draft as many as pay, by measured acceptance and step times")

    @model_validator(mode="after")
    def _fits(self) -> NgramSection:
        if self.method == "suffix" and "max_ngram" in self.model_fields_set:
            raise ValueError("max_ngram has no meaning for method = 'suffix', which looks for the longest match: leave it out")
        if self.method == "lookup" and self.min_ngram > self.max_ngram:
            raise ValueError(f"min_ngram = {self.min_ngram} is more than max_ngram = {self.max_ngram}")
        return self


manifest = Manifest(name="ngram", summary="drafts from the request's own tokens", section=NgramSection)


@hookimpl
def register_ops(context: WorkerContext, ops: OpRegistry) -> None:
    from kernel_ngram.lookup import look_up_slots

    ops.register("look_up", look_up_slots, owner=context.plugin, priority=-1)


@hookimpl
def make_drafter(context: WorkerContext) -> Drafter:
    from kernel_ngram.drafter import NgramDrafter

    return NgramDrafter(context.section, context.max_slots, context.ops.resolve("look_up"))
