"""Prefix caching: the KV of tokens that were computed before is used again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kernel_core.api import BuildContext, EngineContext, Manifest, RequestPreparer, hookimpl

if TYPE_CHECKING:
    from kernel_core.api import PrefixIndex

manifest = Manifest(name="prefix_caching", summary="prompts that begin as earlier ones did use their KV again")


@hookimpl
def register_fields() -> Mapping[str, type]:
    from kernel_prefix_caching.request import CacheFields

    return {"request": CacheFields}


@hookimpl
def prepare_request(context: BuildContext) -> RequestPreparer:
    from kernel_prefix_caching.request import Preparer

    return Preparer()


@hookimpl
def make_prefix_index(context: EngineContext) -> PrefixIndex | None:
    from kernel_prefix_caching.index import make_index

    return make_index(context)
