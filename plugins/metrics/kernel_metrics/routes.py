"""GET /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from kernel_core.api import BuildContext, decode
from kernel_metrics.exposition import text
from kernel_metrics.http import Sender
from kernel_metrics.reading import fixed_labels
from kernel_metrics.records import Sample


def make_router(context: BuildContext, engine: Any, sender: Sender) -> APIRouter:
    router = APIRouter(tags=["operation"])
    labels, compatible = fixed_labels(context), context.section.compatible_names

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
    async def get_metrics() -> Response:
        """Prometheus text: the engine's series, and the HTTP requests of all API processes."""
        await sender.flush()
        samples = decode((await engine.call("metrics.read"))[0], list[Sample])
        return Response(text(samples, labels, compatible), media_type=CONTENT_TYPE_LATEST)

    return router
