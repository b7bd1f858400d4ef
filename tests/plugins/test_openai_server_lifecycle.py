"""`kernel serve` as a whole, over HTTP: it starts, says where it serves, survives its engine, drains and ends."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytest.importorskip("kernel_openai_server.app")
pytestmark = pytest.mark.slow
PATIENCE = 60.0


class Served:
    """A running `kernel serve`; its standard output is read until it says where it serves."""

    def __init__(self, model: Path, *arguments: str, port: str = "0"):
        command = [sys.executable, "-m", "kernel_core", "serve", "-m", str(model), "--device", "cpu", *arguments]
        command += ["--set", "engine.sampling_defaults=kernel", "--set", "engine.max_requests=4"]
        command += ["--port", port] if port else []
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        self.banner = ""

    def wait(self) -> None:
        """Until the banner is complete."""
        while "serving:" not in self.banner:
            line = self.process.stdout.readline()
            assert line, f"it ended: {self.process.stderr.read()}"
            self.banner += line
        found = re.search(r"http://127\.0\.0\.1:(\d+)", self.banner)
        self.port = int(found[1]) if found else 0

    def children(self, module: str) -> list[psutil.Process]:
        everybody = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in everybody if any(module in part for part in child.cmdline())]

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def health(self) -> int:
        connection = self.connection()
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return connection.getresponse().status

    def stream(self, max_tokens: int) -> tuple[http.client.HTTPConnection, Iterator[dict]]:
        """The connection and the events of a completion, the last one without [DONE]."""
        connection = self.connection()
        body = {"model": self.model_name, "prompt": "Hello", "max_tokens": max_tokens, "stream": True, "ignore_eos": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        return connection, (json.loads(line[6:]) for line in response if line.startswith(b"data: {"))

    @property
    def model_name(self) -> str:
        return re.search(r"model: +(.*)", self.banner)[1]

    def end(self) -> tuple[int, str]:
        """SIGTERM → exit code, standard error."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


@contextlib.contextmanager
def serve(model: Path, *arguments: str, **more: str) -> Iterator[Served]:
    served = Served(model, *arguments, **more)
    try:
        yield served
    finally:
        if served.process.poll() is None:
            served.process.kill()
            served.process.communicate(timeout=PATIENCE)


def until(condition) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def refused(served: Served) -> bool:
    try:
        socket.create_connection(("127.0.0.1", served.port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def text_of(events) -> str:
    return "".join(event["choices"][0]["text"] for event in events if event.get("choices"))


def test_it_says_where_it_serves_and_ends_clean(byte_model):
    with serve(byte_model) as served:
        served.wait()
        assert served.port > 0 and "device:" in served.banner and "openai_server" in served.banner
        assert served.health() == 200
        _, events = served.stream(5)
        assert list(events)[-1]["choices"][0]["finish_reason"] == "length"
        code, errors = served.end()
        assert code == 0 and errors == "" and refused(served)


def test_the_engine_is_started_again_after_it_was_killed_in_a_stream(byte_model):
    with serve(byte_model) as served:
        served.wait()
        _, events = served.stream(240)
        next(events)
        (engine,) = served.children("engine.process")
        engine.kill()
        assert "error" in list(events)[-1]
        assert served.health() == 503
        until(lambda: served.health() == 200)
        (second,) = served.children("engine.process")
        assert second.pid != engine.pid
        _, events = served.stream(5)
        assert list(events)[-1]["choices"][0]["finish_reason"] == "length"
        code, errors = served.end()
        assert code == 0 and "killed by SIGKILL" in errors


def test_an_engine_that_dies_too_often_ends_the_server(byte_model):
    with serve(byte_model, "--max-restarts", "0") as served:
        served.wait()
        served.children("engine.process")[0].kill()
        _, errors = served.process.communicate(timeout=PATIENCE)
        assert served.process.returncode == 1 and "engine died too often (0 restarts in a row)" in errors


def test_a_running_request_ends_before_the_server_does(byte_model):
    with serve(byte_model) as served:
        served.wait()
        _, events = served.stream(200)
        first = next(events)
        served.process.send_signal(signal.SIGTERM)
        until(lambda: refused(served))
        rest = list(events)
        assert rest[-1]["choices"][0]["finish_reason"] == "length" and text_of([first, *rest])
        served.process.communicate(timeout=PATIENCE)
        assert served.process.returncode == 0


def test_a_drain_that_takes_too_long_ends_the_request_with_an_error(byte_model):
    with serve(byte_model, "--drain-seconds", "0") as served:
        served.wait()
        _, events = served.stream(250)
        next(events)
        served.process.send_signal(signal.SIGTERM)
        last = list(events)[-1]
        assert "drain_seconds" in last["error"]["message"]
        served.process.communicate(timeout=PATIENCE)
        assert served.process.returncode == 0


def test_a_second_signal_stops_at_once_and_leaves_no_process(byte_model):
    with serve(byte_model) as served:
        served.wait()
        _, events = served.stream(250)
        next(events)
        family = psutil.Process(served.process.pid).children(recursive=True)
        served.process.send_signal(signal.SIGINT)
        until(lambda: refused(served))
        served.process.send_signal(signal.SIGINT)
        served.process.communicate(timeout=PATIENCE)
        assert served.process.returncode in (0, 1)
        assert not [child for child in family if child.is_running()]


def test_killing_the_supervisor_leaves_no_process(byte_model):
    with serve(byte_model) as served:
        served.wait()
        family = psutil.Process(served.process.pid).children(recursive=True)
        assert len(family) == 2
        served.process.kill()
        until(lambda: not [c for c in family if c.is_running() and c.status() != psutil.STATUS_ZOMBIE])


def test_two_api_processes_share_one_port_and_one_engine(byte_model):
    with serve(byte_model, "--api-processes", "2") as served:
        served.wait()
        apis = served.children("api_process")
        assert len(apis) == 2 and "2 API processes" in served.banner
        streams = [served.stream(60) for _ in range(8)]
        assert all(list(events)[-1]["choices"][0]["finish_reason"] == "length" for _, events in streams)
        apis[0].kill()
        until(lambda: len(served.children("api_process")) == 2)
        assert all(served.health() == 200 for _ in range(8))
        assert served.end()[0] == 0


def test_a_unix_socket_serves_and_is_removed(byte_model, tmp_path):
    path = str(tmp_path / "http")
    with serve(byte_model, "--uds", path, port="") as served:
        served.wait()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 200")
        assert served.end()[0] == 0 and not os.path.exists(path)
