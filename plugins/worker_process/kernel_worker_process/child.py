"""The worker process: `python -m kernel_worker_process.child FD`. Ends when the engine's end of the socket is closed."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from kernel_core.api import Allocation, KernelError, ModelInfo, StepPlan, decode, encode
from kernel_worker_process.channel import ALLOCATE, CALL, CLOSE, DONE, FAILED, RUN, START, Channel

if TYPE_CHECKING:
    from kernel_core.nn.api import Rank


class Served:
    """One worker, driven by messages."""

    def __init__(self) -> None:
        self._worker: Rank | None = None

    @property
    def worker(self) -> Rank:
        if self._worker is None:
            raise RuntimeError("the worker is not started")
        return self._worker

    def start(self, payload: bytes) -> bytes:
        from kernel_core.nn.api import open_worker

        plan, model = decode(payload, tuple[bytes, ModelInfo])
        self._worker = open_worker(plan, model)
        return encode(self._worker.start())

    def allocate(self, payload: bytes) -> bytes:
        self.worker.allocate(decode(payload, Allocation))
        return b""

    def run(self, payload: bytes) -> bytes:
        return encode(self.worker.run(decode(payload, StepPlan)))

    def call(self, payload: bytes) -> bytes:
        method, data = decode(payload, tuple[str, bytes])
        return self.worker.call(method, data)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


def serve(channel: Channel) -> None:
    """Answer each message with one, until CLOSE or the end of the socket."""
    served = Served()
    verbs: dict[int, Callable[[bytes], bytes]] = {
        START: served.start,
        ALLOCATE: served.allocate,
        RUN: served.run,
        CALL: served.call,
    }
    while True:
        kind, payload = channel.receive()
        if kind == CLOSE:
            served.close()
            return channel.send(DONE)
        try:
            answer = verbs[kind](payload)
        except Exception as error:  # noqa: BLE001 whatever it is, the engine must hear of it
            channel.send(FAILED, _failure(error))
        else:
            channel.send(DONE, answer)


def _failure(error: Exception) -> bytes:
    kind = type(error).__name__ if isinstance(error, KernelError) else ""
    text = str(error) if kind else f"{type(error).__name__}: {error}"
    return encode((kind, text, traceback.format_exc()))


def main() -> None:
    fd = int(sys.argv[1])
    os.set_inheritable(fd, False)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # the engine's standard output is for results
    channel = Channel(socket.socket(fileno=fd))
    try:
        serve(channel)
    except EOFError:
        sys.exit(1)  # nobody is left to tell


if __name__ == "__main__":
    main()
