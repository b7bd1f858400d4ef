"""The OpenAI HTTP API of an engine."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from kernel_core.api import BuildContext, Manifest, hookimpl
from kernel_openai_server.section import ServerSection

manifest = Manifest(
    name="openai_server",
    summary="HTTP with the OpenAI API: completions, chat, responses; `kernel serve`",
    provides=("openai/1",),
    uses=("tools/1", "grammar/1"),
    section=ServerSection,
)


@hookimpl
def add_hookspecs() -> ModuleType:
    from kernel_openai_server import hooks

    return hooks


@hookimpl
def make_service(context: BuildContext, name: str) -> Any:
    from kernel_openai_server.app import Service

    return Service(context)
