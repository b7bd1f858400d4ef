"""The request fields."""

from __future__ import annotations

from pydantic import BaseModel, Field

from kernel_core.api import NO_PREFIX_READ, NO_PREFIX_WRITE, Prepared


class CacheFields(BaseModel):
    """By default requests share what they have in common."""

    cache_salt: str | None = Field(None, min_length=1, description="share KV only with requests that have the same salt")
    skip_prefix_cache: bool = Field(False, description="take no KV of other requests and leave them none")


class Preparer:
    """Turns the fields into identity and flags."""

    def prepare(self, request: Prepared) -> None:
        given = CacheFields(**request.fields)
        if given.cache_salt is not None:
            request.identity.append(b"cache_salt:" + given.cache_salt.encode())
        if given.skip_prefix_cache:
            request.flags |= NO_PREFIX_READ | NO_PREFIX_WRITE
