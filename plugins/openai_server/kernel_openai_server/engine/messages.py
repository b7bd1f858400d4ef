"""Messages between API processes and the engine process: one byte that says the kind, then bytes of `kernel_core.wire`.

An API process has a zmq DEALER socket, the engine process a ROUTER socket; both queue without limit, because what can be queued
is bounded by the requests that run: an engine that waited for a slow reader would slow down everybody else, and one that
dropped updates would spoil answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import zmq

from kernel_core.api import EngineFacts, ModelInfo, Request, Updates, decode, encode

T = TypeVar("T")

#: API process → engine
HELLO = b"h"  # nothing; answered by FACTS
ADD = b"a"  # the n sequences of one user request
ABORT = b"x"  # ids of sequences
ASK = b"q"  # number, method, payload; answered by ANSWER or FAILED

#: engine → API process
FACTS = b"F"
UPDATES = b"U"  # of one step, or of several short ones, for the sequences of this API process
MORE = b"M"  # tokens [steps, sequences] of the sequences of the last updates, to which nothing else happened
REFUSED = b"R"  # id of the user request, why
ANSWER = b"A"  # number, answers
FAILED = b"E"  # number, name of the error's class, text
GONE = b"G"  # why the engine ends

BODIES: dict[bytes, Any] = {
    ADD: tuple[Request, ...],
    ABORT: list[str],
    ASK: tuple[int, str, bytes],
    FACTS: EngineFacts,
    UPDATES: list[Updates],
    MORE: np.ndarray,
    REFUSED: tuple[str, str],
    ANSWER: tuple[int, list[bytes]],
    FAILED: tuple[int, str, str],
    GONE: str,
}

#: methods that the engine process itself answers; everything else is a registered call
RESET_CACHE = "engine.reset_cache"
LOAD = "engine.load"


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How full the engine is. Blocks are per KV group, without the null block."""

    running: int
    waiting: int
    free_blocks: tuple[int, ...]
    num_blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EngineJob:
    """What the engine process is started with."""

    plan: bytes
    model: ModelInfo
    address: str


@dataclass(frozen=True, slots=True)
class ApiJob:
    """What an API process is started with. `listener` is an inherited file descriptor, bound."""

    plan: bytes
    model: ModelInfo
    address: str
    listener: int
    api_processes: int = field(default=1)


def pack(kind: bytes, body: Any = None) -> bytes:
    return kind if body is None else kind + encode(body)


def unpack(message: bytes) -> tuple[bytes, Any]:
    """(kind, body). Raises msgspec.ValidationError, KeyError for what is no message."""
    kind = message[:1]
    return (kind, None) if len(message) == 1 else (kind, decode(memoryview(message)[1:], BODIES[kind]))


def configure(socket: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """Queues without limit, no waiting at the end, quick to find an engine that starts again."""
    socket.setsockopt(zmq.SNDHWM, 0)
    socket.setsockopt(zmq.RCVHWM, 0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, 20)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
    return socket
