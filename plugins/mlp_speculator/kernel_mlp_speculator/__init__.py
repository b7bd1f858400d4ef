"""MLP speculators (https://arxiv.org/abs/2404.19124): small stages that draft from the target's last state and token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kernel_core.api import Manifest, Section, hookimpl

if TYPE_CHECKING:
    from kernel_core.nn.api import Drafter, WorkerContext


class MLPSpeculatorSection(Section):
    """`[plugins.mlp_speculator]`."""

    head: str = Field(description="the speculator's checkpoint: a directory, a hub id or an embedded name")
    tree: bool = Field(default=False, description="draft the most probable candidates of every stage instead of one chain")
    draft_tokens: int | None = Field(
        default=None, ge=1, le=32, description="most drafts a step; none given: n_predict of the checkpoint, for trees 8"
    )
    adaptive: bool = Field(default=True, description="draft as many as pay, by measured acceptance and step times")


manifest = Manifest(
    name="mlp_speculator", summary="drafts by an MLP speculator, chain or candidate tree", section=MLPSpeculatorSection
)


@hookimpl
def make_drafter(context: WorkerContext) -> Drafter:
    from kernel_mlp_speculator.drafter import SpeculatorDrafter

    return SpeculatorDrafter(context.section, context.max_slots)
