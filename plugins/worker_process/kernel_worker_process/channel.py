"""Messages over a socket: a kind (one byte), a length, and bytes of `kernel_core.wire`. No pickle."""

from __future__ import annotations

import select
import socket
import struct
from collections import deque

HEADER = struct.Struct("<BQ")
CHUNK = 1 << 18

#: kinds, engine → worker
START, ALLOCATE, RUN, CALL, CLOSE = range(5)
#: kinds, worker → engine
DONE, FAILED = range(5, 7)


class Channel:
    """One end. Messages arrive whole and in order. `send` takes in what arrives meanwhile, so that two full pipes never
    wait for each other. EOFError: the other end is gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        sock.setblocking(False)
        self._buffer = bytearray()
        self._unsent = bytearray()  # kept, so that an interrupted `send` breaks no message
        self._arrived: deque[tuple[int, bytes]] = deque()

    def send(self, kind: int, payload: bytes = b"") -> None:
        self._unsent += HEADER.pack(kind, len(payload)) + payload
        while self._unsent:
            readable, writable, _ = select.select([self._socket], [self._socket], [])
            if readable:
                self._take_in()
            if writable:
                del self._unsent[: self._write()]

    def _write(self) -> int:
        try:
            with memoryview(self._unsent) as data:
                return self._socket.send(data[:CHUNK])
        except BlockingIOError:
            return 0
        except OSError as error:
            raise EOFError from error

    def receive(self, timeout: float | None = None) -> tuple[int, bytes]:
        """The next message. Raises TimeoutError after `timeout` seconds without any byte."""
        while not self._arrived:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise TimeoutError
            self._take_in()
        return self._arrived.popleft()

    def _take_in(self) -> None:
        try:
            data = self._socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        self._buffer += data
        self._split()

    def _split(self) -> None:
        while len(self._buffer) >= HEADER.size:
            kind, size = HEADER.unpack_from(self._buffer)
            end = HEADER.size + size
            if len(self._buffer) < end:
                return
            self._arrived.append((kind, bytes(memoryview(self._buffer)[HEADER.size : end])))
            del self._buffer[:end]

    def close(self) -> None:
        self._socket.close()
