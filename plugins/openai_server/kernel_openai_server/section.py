"""The section `[plugins.openai_server]`."""

from __future__ import annotations

from pydantic import Field

from kernel_core.api import KernelConfig, Section

NAME = "openai_server"


class ServerSection(Section):
    """What a server may do and how much of it. Flags of `kernel serve` override single keys."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one, printed at the start
    uds: str | None = None  # a path: serve on this Unix socket, instead of host and port
    ssl_certfile: str | None = None  # PEM, with the chain; needs ssl_keyfile
    ssl_keyfile: str | None = None
    api_processes: int = Field(1, ge=1, le=64)  # processes that speak HTTP; one serves tens of thousands of tokens a second
    drain_seconds: float = Field(30.0, ge=0)  # how long running requests may take to end after SIGTERM
    keep_alive_seconds: int = Field(60, ge=1)  # idle connections are closed after this time
    max_restarts: int = Field(5, ge=0)  # of the engine or an API process in a row; then the server ends with exit code 1
    root_path: str = ""  # where a proxy mounts the server, as "/llm"
    served_model_name: tuple[str, ...] = ()  # what clients call the model; the first one is shown. Empty: `model`
    api_keys: tuple[str, ...] = Field((), repr=False)  # any of these opens the API; also KERNEL_API_KEY. Empty: open to all
    cors_origins: tuple[str, ...] = ()  # origins that browsers may call from; "*": all. Empty: no CORS at all
    max_body_bytes: int = Field(8 << 20, ge=1024)
    body_seconds: float = Field(60.0, gt=0)  # a body that takes longer to arrive is refused with 408
    request_seconds: float | None = Field(3600.0, gt=0)  # a request that takes longer is ended with 504
    max_queue: int | None = Field(4096, ge=1)  # unfinished requests beyond which new ones get 429
    max_choices: int = Field(128, ge=1)  # n times the number of prompts of one request
    max_logprobs: int = Field(20, ge=-1)  # the most alternatives a request may ask for; -1: the whole vocabulary
    chat_template: str | None = None  # a file with a Jinja template, instead of the model's
    allow_chat_template: bool = False  # let requests bring a chat template of their own (it runs in a sandbox)
    reasoning_spelling: tuple[str, ...] = ("reasoning",)  # field names for reasoning: also "reasoning_content"
    reports_usage: bool = False  # every stream ends with usage, as if stream_options.include_usage were given
    stored_responses: int = Field(1000, ge=0)  # of /v1/responses, kept in memory for GET and previous_response_id; the oldest go
    stored_bytes: int = Field(64 << 20, ge=0)  # the same, by size
    log_requests: bool = False  # a line for each request to the standard error
    documents: bool = True  # /docs and /openapi.json


def section_of(config: KernelConfig) -> ServerSection:
    """The section of a resolved configuration."""
    values = config.plugins.get(NAME)
    return ServerSection.model_validate(values if isinstance(values, dict) else {})
