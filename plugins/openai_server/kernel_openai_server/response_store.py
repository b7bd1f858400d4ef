"""Responses that were made, bounded in number and size; the oldest go. In the memory of one API process."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from kernel_openai_server.errors import ApiError
from kernel_openai_server.protocol.objects import json_bytes
from kernel_openai_server.protocol.requests import ChatMessage
from kernel_openai_server.protocol.responses import ResponseObject


@dataclass(slots=True)
class Stored:
    """`conversation`: what was said before and, once it is complete, the answer; without instructions. `task` runs it in the
    background."""

    response: ResponseObject
    conversation: list[ChatMessage]
    size: int = 0
    task: asyncio.Task[None] | None = None


class ResponseStore:
    """By id."""

    def __init__(self, limit: int, max_bytes: int) -> None:
        self._limit, self._max_bytes = limit, max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def put(self, stored: Stored) -> None:
        """Keep it, or what it is now."""
        self._forget(stored.response.id)
        stored.size = len(json_bytes(stored.response)) + sum(len(m.model_dump_json()) for m in stored.conversation)
        self._stored[stored.response.id] = stored
        self._bytes += stored.size
        while self._stored and (len(self._stored) > self._limit or self._bytes > self._max_bytes):
            self._forget(next(iter(self._stored)))

    def get(self, name: str, param: str | None = None) -> Stored:
        """Raises ApiError."""
        if name not in self._stored:
            message = f"there is no response {name!r}: it was not stored, or is too old"
            raise ApiError(404, message, param=param, code="response_not_found")
        return self._stored[name]

    def holds(self, stored: Stored) -> bool:
        return self._stored.get(stored.response.id) is stored

    def delete(self, name: str) -> Stored:
        """Raises ApiError."""
        stored = self.get(name)
        self._forget(name)
        return stored

    def _forget(self, name: str) -> None:
        old = self._stored.pop(name, None)
        if old is not None:
            self._bytes -= old.size
