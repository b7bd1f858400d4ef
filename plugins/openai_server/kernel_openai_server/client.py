"""What the HTTP side uses of an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel

from kernel_core.api import RequestOutput, SamplingParams, TextCodec


class EngineClient(Protocol):
    """The face of an engine: `kernel_core.api.AsyncEngine`, whose engine runs in a thread, and `RemoteEngine`, whose engine is in
    another process. One event loop."""

    @property
    def codec(self) -> TextCodec | None:
        """Text to tokens and back; None without the text plugin."""
        ...

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens of one sequence together."""
        ...

    @property
    def dead(self) -> str | None:
        """Why it takes nothing any more, or None."""
        ...

    @property
    def summary(self) -> str:
        """Model, device and sizes in one line."""
        ...

    @property
    def request_fields(self) -> Mapping[str, type[BaseModel]]:
        """The request fields that plugins registered: plugin → pydantic model."""
        ...

    def params(self, **fields: Any) -> SamplingParams:
        """The model's defaults with the given fields, those of plugins included. Names and values are checked by `generate`."""
        ...

    def generate(
        self, prompt: Any, params: SamplingParams | None = None, request_id: str | None = None, **sampling: Any
    ) -> AsyncIterator[RequestOutput]:
        """Everything of the request so far, again and again. An item may be a live object: read it before the next await. Closing
        the iterator aborts. Raises RequestError at the first item, EngineDeadError when the engine died."""
        ...

    async def abort(self, ids: str | Sequence[str]) -> None:
        """End requests; unknown ids are ignored."""
        ...

    async def call(self, method: str, payload: bytes = b"") -> list[bytes]:
        """A registered call "plugin.name"."""
        ...

    async def reset_cache(self) -> None:
        """Forget the KV of earlier requests."""
        ...

    def service(self, name: str, protocol: type | None = None) -> Any:
        """A service of the face."""
        ...

    async def verb(self, name: str, *args: Any, **kw: Any) -> Any:
        """A verb that a plugin registered."""
        ...
