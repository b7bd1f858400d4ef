"""Tool calls and reasoning: read out of what a model writes, forced by a grammar, checked in conversations."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pydantic import Field

from kernel_core.api import BuildContext, Manifest, Section, Verb, hookimpl


class ToolSection(Section):
    parser: str = Field("auto", description="how the model writes tool calls; auto: what its chat template shows")
    reasoning_parser: str = Field("auto", description='how it marks reasoning; auto: as parser; "none": it does not')


manifest = Manifest(
    name="tool_calling",
    summary="Tool calls and reasoning, read out of answers; tool_choice by a grammar",
    requires=("text/1",),
    provides=("tools/1",),
    uses=("grammar/1",),
    section=ToolSection,
)


@hookimpl
def add_hookspecs() -> ModuleType:
    from kernel_tool_calling import hooks

    return hooks


@hookimpl
def make_service(context: BuildContext, name: str) -> Any:
    from kernel_tool_calling.service import make_tools

    return make_tools(context)


@hookimpl
def register_verbs(context: BuildContext) -> Mapping[str, Verb]:
    from kernel_tool_calling.verbs import make_verbs

    return make_verbs(context)
