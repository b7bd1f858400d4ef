"""A page at `/`: a chat with all its controls, and the engine at work. Static files only; nothing is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kernel_core.api import BuildContext, EngineContext, Manifest, Observer, Section, hookimpl

if TYPE_CHECKING:
    from fastapi import APIRouter

WATCH = "watch"  # in the shared state of the engine part


class PlaygroundSection(Section):
    """Nothing to set: the page uses the server's own routes, with the key that its user types."""


manifest = Manifest(
    name="playground",
    summary="a page at / of a server: a chat, and the engine at work",
    section=PlaygroundSection,
)


@hookimpl
def make_observer(context: EngineContext) -> Observer:
    from kernel_playground.watch import Watch

    context.shared[WATCH] = watch = Watch(context)
    return watch


@hookimpl
def register_calls(context: BuildContext) -> Mapping[str, Callable[[bytes], bytes]]:
    """Of the engine part: "playground.view" gives what the page draws."""
    if context.part != "engine":
        return {}

    def view(data: bytes) -> bytes:
        return context.shared[WATCH].view(data)

    return {"view": view}


@hookimpl(optionalhook=True)
def register_routes(context: BuildContext, engine: Any) -> APIRouter:
    from kernel_playground.routes import make_router

    return make_router(context, engine)
