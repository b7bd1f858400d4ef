"""EAGLE heads (https://arxiv.org/abs/2401.15077, 2406.16858, 2503.01840): a small layer that drafts from the target's states."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from kernel_core.api import Manifest, Section, hookimpl

if TYPE_CHECKING:
    from kernel_core.nn.api import LayeredDrafter, WorkerContext


class EagleSection(Section):
    """`[plugins.eagle]`."""

    head: str = Field(description="the head's checkpoint: a directory, a hub id or an embedded name")
    method: Literal["auto", "eagle", "eagle3"] = Field(default="auto", description="the head's format; auto: by its config.json")
    draft_tokens: int | None = Field(default=None, ge=1, le=64, description="most drafts a step; none given: 3, for trees 16")
    tree: bool = Field(default=False, description="draft a dynamic tree instead of a chain")
    tree_depth: int = Field(default=4, ge=1, le=16, description="levels of a tree")
    tree_top_k: int = Field(default=4, ge=1, le=16, description="candidates after each node, and nodes continued on each level")
    adaptive: bool = Field(default=True, description="draft as many as pay, by measured acceptance and step times")

    @property
    def candidates(self) -> int:
        """How many nodes a tree of this shape has before the best are chosen."""
        return self.tree_top_k + (self.tree_depth - 1) * self.tree_top_k**2

    @property
    def width(self) -> int:
        return self.draft_tokens or (min(16, self.candidates) if self.tree else 3)

    @model_validator(mode="after")
    def _fits(self) -> EagleSection:
        if self.tree and self.width > self.candidates:
            raise ValueError(
                f"draft_tokens = {self.width} is more than the {self.candidates} candidates of a tree with tree_depth = "
                f"{self.tree_depth} and tree_top_k = {self.tree_top_k}: ask for fewer, or for a larger tree"
            )
        if not self.tree and self.width > 32:
            raise ValueError(f"draft_tokens = {self.width}: a chain has at most 32 drafts")
        shape = {"tree_depth", "tree_top_k"} & self.model_fields_set
        if shape and not self.tree:
            raise ValueError(f"{' and '.join(sorted(shape))} shape a tree: set tree = true as well, or leave them out")
        return self


manifest = Manifest(name="eagle", summary="drafts by an EAGLE or EAGLE-3 head, chain or dynamic tree", section=EagleSection)


@hookimpl
def make_drafter(context: WorkerContext) -> LayeredDrafter:
    from kernel_eagle.drafter import EagleDrafter

    return EagleDrafter(context.section, context)
