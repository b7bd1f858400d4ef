"""POST /start_profile and POST /stop_profile. No request names a path: traces go to the section's directory."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Body
from pydantic import BaseModel, ConfigDict


class Verbs(Protocol):
    """What the routes use of an engine."""

    async def verb(self, name: str, *args: Any, **kw: Any) -> Any: ...


class StartProfile(BaseModel):
    """Body of POST /start_profile, which may be left out."""

    model_config = ConfigDict(extra="forbid")
    prefix: str = ""


def make_router(engine: Verbs) -> APIRouter:
    router = APIRouter(tags=["profiling"])

    @router.post("/start_profile")
    async def start_profile(body: Annotated[StartProfile | None, Body()] = None) -> dict[str, str]:
        await engine.verb("start_profile", (body or StartProfile()).prefix)
        return {"status": "started"}

    @router.post("/stop_profile")
    async def stop_profile() -> dict[str, Any]:
        return {"status": "stopped", "files": await engine.verb("stop_profile")}

    return router
