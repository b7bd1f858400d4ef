"""What the processes of a server share: how one is started, how it reports, and that it never outlives its parent.

Its standard input brings what it is started with and stays open as long as the parent lives; its standard output carries
reports, one JSON object a line. Whatever it prints goes to the standard error that it inherits."""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import threading
import time
from typing import Any, BinaryIO

LENGTH = struct.Struct("<Q")
GRACE = 10.0  # seconds to end by itself after the parent died


class Reports:
    """To the parent."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def send(self, kind: str, **values: Any) -> None:
        try:
            self._file.write(json.dumps({"kind": kind, **values}).encode() + b"\n")
            self._file.flush()
        except BrokenPipeError:
            return  # the parent died; the end of standard input says so too

    def failed(self, error: BaseException) -> None:
        self.send("failed", error=type(error).__name__, text=str(error) or type(error).__name__)


def adopt() -> tuple[bytes, Reports]:
    """In the child, first of all → (what it is started with, its reports). When the parent dies it gets SIGTERM, and is ended
    `GRACE` seconds later if it is still there."""
    job = sys.stdin.buffer.read(LENGTH.unpack(sys.stdin.buffer.read(LENGTH.size))[0])
    reports = Reports(os.fdopen(os.dup(sys.stdout.fileno()), "wb"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    threading.Thread(target=_watch_parent, name="parent", daemon=True).start()
    return job, reports


def _watch_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(1)


def framed(job: bytes) -> bytes:
    """For the child's standard input."""
    return LENGTH.pack(len(job)) + job
