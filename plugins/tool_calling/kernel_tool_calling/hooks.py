"""Hook specifications of this plugin. Others implement them with `@hookimpl(optionalhook=True)`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernel_core.api import BuildContext, home, hookspec

if TYPE_CHECKING:
    from kernel_tool_calling.contract import ReasoningTags, ToolFormat


@hookspec
@home("face", composes="all")
def register_tool_formats(context: BuildContext) -> Mapping[str, ToolFormat]:
    """Formats in which models write tool calls, by the name that `parser` in the configuration takes: objects with the attributes
    and methods of `ToolFormat`. Called at build. They are asked before the built-in ones by `parser = "auto"`; a name of a
    built-in one takes its place."""
    raise NotImplementedError


@hookspec
@home("face", composes="all")
def register_reasoning_tags(context: BuildContext) -> Mapping[str, ReasoningTags]:
    """Marks around reasoning, by the name that `reasoning_parser` takes: (opening text, closing text). Called at build."""
    raise NotImplementedError
