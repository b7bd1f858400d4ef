"""A real server on loopback for the tests of plugins that serve something."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest


class Server:
    """A running `kernel serve`. `url` has no slash at its end."""

    def __init__(self, *arguments: str, model: str = "tiny-chat", environment: dict[str, str] | None = None):
        command = [sys.executable, "-m", "kernel_core", "serve", "-m", str(model), "--device", "cpu", "--port", "0", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        banner = ""
        while "serving:" not in banner:
            line = self.process.stdout.readline()
            assert line, f"it ended: {self.process.stderr.read()}"
            banner += line
        self.url = re.search(r"serving: +(http://\S+)", banner)[1]

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.communicate(timeout=60)
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="module")
def start_server() -> Iterator[Callable[..., Server]]:
    """Start servers by arguments of `kernel serve`; all end with the module."""
    started: list[Server] = []

    def start(*arguments: str, **more: object) -> Server:
        started.append(Server(*arguments, **more))
        return started[-1]

    yield start
    for server in started:
        server.close()
