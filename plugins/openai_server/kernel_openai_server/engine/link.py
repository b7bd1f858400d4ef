"""An API process's end of the connection to the engine process: a zmq DEALER socket in an asyncio event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from kernel_openai_server.engine import messages

BATCH = 8  # messages taken before the readers of what they brought get their turn


class Link:
    """One connection to one life of the engine process. It waits until somebody answers at the address; when that process is
    gone, `lost` is called once, after the last message was taken, and the link is closed. Messages of an earlier life never
    reach a later one, because each life gets a link of its own."""

    def __init__(self, address: str, receive: Callable[[bytes], None], drained: Callable[[], None], lost: Callable[[], None]):
        self._receive, self._drained, self._lost = receive, drained, lost
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context()
        self._socket = messages.configure(self._context.socket(zmq.DEALER))
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._socket.connect(address)
        self._handles = [socket.getsockopt(zmq.FD) for socket in (self._socket, self._monitor)]
        for handle in self._handles:
            self._loop.add_reader(handle, self._readable)
        self._closed = self._met = False

    def send(self, message: bytes) -> None:
        """Queue it; never waits. Nothing happens on a link that is closed."""
        if self._closed:
            return
        self._socket.send(message, zmq.NOBLOCK)
        if self._arrived(self._socket):  # sending may swallow the signal that something arrived
            self._loop.call_soon(self._readable)

    def _readable(self) -> None:
        """Take what is there. zmq signals a change, not a state, so what is left is taken in the loop's next round."""
        if self._closed:
            return
        taken = 0
        while taken < BATCH and self._arrived(self._socket):
            self._receive(self._socket.recv(zmq.NOBLOCK))
            taken += 1
        if taken:
            self._drained()
            self._loop.call_soon(self._readable)
        elif self._disconnected():
            self.close()
            self._lost()

    @staticmethod
    def _arrived(socket: zmq.Socket[bytes]) -> bool:
        return bool(socket.getsockopt(zmq.EVENTS) & zmq.POLLIN)

    def _disconnected(self) -> bool:
        """Did a process that answered go away? One that is dying may still be connected to, and never answers: zmq then tries
        again by itself, and what was queued goes to the next one."""
        while self._arrived(self._monitor):
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            if event == zmq.EVENT_DISCONNECTED and self._met:
                return True
            self._met = self._met or event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        return False

    def close(self) -> None:
        """Idempotent."""
        if self._closed:
            return
        self._closed = True
        for handle in self._handles:
            self._loop.remove_reader(handle)
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._context.term()
