"""GET / and its files are public and the same for everybody; /playground/view and /playground/about ask for the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Query, Response

from kernel_core.api import BuildContext

TYPES = {".html": "text/html; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}
TYPES |= {".svg": "image/svg+xml"}
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def make_router(context: BuildContext, engine: Any) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    for entry in files("kernel_playground").joinpath("static").iterdir():
        suffix = "." + entry.name.rpartition(".")[2]
        if suffix in TYPES:
            path = "/" if entry.name == "index.html" else f"/playground/{entry.name}"
            router.get(path)(static(entry.read_bytes(), TYPES[suffix]))

    @router.get("/playground/view")
    async def view(since: int = Query(0, ge=0)) -> Response:
        """What the engine does: steps after `since`, sequences, blocks."""
        (found,) = await engine.call("playground.view", str(since).encode())
        return Response(found, media_type="application/json", headers={"cache-control": "no-store"})

    @router.get("/playground/about")
    async def about() -> Response:
        """What runs, and why."""
        told = {"summary": engine.summary, "explanation": context.explanation}
        return Response(json.dumps(told), media_type="application/json")

    return router


def static(content: bytes, media_type: str) -> Callable[..., Any]:
    async def get_file() -> Response:
        return Response(content, media_type=media_type, headers=HEADERS)

    get_file.public = True  # type: ignore[attr-defined]
    return get_file
