"""The order of waiting requests by what the prefix cache spares them, with a bound on how long anybody waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from kernel_core.api import EngineContext, Manifest, Section, hookimpl

if TYPE_CHECKING:
    from kernel_core.api import Policy


class CacheAware(Section):
    """`[plugins.cache_aware]`."""

    window: int = Field(64, ge=0, description="how many earlier arrivals a request may be served before, at most")
    refresh: int = Field(32, ge=1, description="waiting requests looked up again in each step")


manifest = Manifest(
    name="cache_aware",
    summary="prompts that are cached already are served first, within a bounded window",
    section=CacheAware,
    after=("priority",),  # with it: by priority, and among equals by hits
)


@hookimpl
def make_policy(context: EngineContext) -> Policy:
    from kernel_cache_aware.policy import CacheAwarePolicy

    return CacheAwarePolicy(context.section.window, context.section.refresh)
