"""Files of requests in the OpenAI batch format, answered by an engine in this process through the server's application."""

from __future__ import annotations

from pydantic import Field

from kernel_core.api import Manifest, Section


class BatchSection(Section):
    concurrency: int = Field(256, ge=1, le=65536, description="requests that the engine has at once; it queues what does not run")
    max_line_bytes: int = Field(8 << 20, ge=1024, description="a longer line of the input is an error of that line")
    max_download_bytes: int = Field(1 << 30, ge=1024, description="of an input that is given as a URL")
    transfer_seconds: float = Field(1000.0, gt=0, description="how long a download or an upload may take")
    upload_tries: int = Field(5, ge=1, description="how often an upload that fails is tried")
    upload_pause_seconds: float = Field(5.0, ge=0, description="how long to wait between two of them")


manifest = Manifest(
    name="openai_batch",
    summary="Files of requests in the OpenAI batch format; `kernel run-batch`",
    requires=("openai/1",),
    section=BatchSection,
)
