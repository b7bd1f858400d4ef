"""How many token chunks a server streams, on a device that computes nothing: `serving.py [--streams N] [--tokens N] ...`
→ build/bench/serving.json and one line each.

stream: `kernel serve` with one API process; a client of plain sockets in a process of its own reads every stream of
/v1/completions. Counted are events that bring tokens, on the clock and for each second that the API process computed.
loop: mean time of an engine step when nobody listens, and when an API process takes every update; with a device that takes
no time at all, and with one that takes 3 ms, during which the engine waits. The requests and their steps are the same."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MODEL, VOCAB = "tiny-chat", 4000
PACE = 0.003  # seconds of a step of a device that takes time, for the loop
LOOP_TOKENS = {0.0: 3300, PACE: 1300}  # of each request of the loop, by the seconds of a step
BEGIN, END = 300, 200  # steps with all requests that are not counted
PAIRS = 5  # of loops with nobody and with an API process


def _null_executor(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("null_executor", Path(__file__).with_name("null_executor.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))


def _settings(streams: int, tokens: int, step_seconds: float) -> dict[str, Any]:
    null = {"vocab_size": VOCAB, "max_model_len": tokens + 64, "step_seconds": step_seconds}
    engine = {"max_requests": streams, "kv_blocks": streams * (tokens // 16 + 4) + 16, "sampling_defaults": "kernel"}
    return {
        "model": MODEL,
        "executor": "null_executor",
        "engine": engine,
        "plugins": {"null_executor": null, "openai_server": {}},
    }


# ---- stream


async def read_streams(port: int, streams: int, tokens: int) -> dict[str, float]:
    """All streams at once → events with tokens, seconds from the first to the last."""
    body = {"model": MODEL, "prompt": "Hello", "max_tokens": tokens, "temperature": 1.0, "ignore_eos": True, "stream": True}
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n"
    request = head.encode() + b"connection: close\r\n\r\n" + data
    first: list[float] = []

    async def one() -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
        writer.write(request)
        events, tail = 0, b""
        while data := await reader.read(1 << 16):
            first.append(time.monotonic()) if not first else None
            data = tail + data
            events += data.count(b"data: {")
            tail = data[-6:] if not data.endswith(b"\n") else b""
        writer.close()
        return events

    events = sum(await asyncio.gather(*(one() for _ in range(streams))))
    return {"events": events, "seconds": time.monotonic() - first[0]}


def measure_stream(streams: int, tokens: int, step_seconds: float) -> dict[str, float]:
    settings = _settings(streams, tokens, step_seconds)
    command = [sys.executable, "-m", "kernel_core", "serve", "--port", "0", "--model", MODEL]
    command += ["--set", 'executor="null_executor"']
    for table, values in (("engine", settings["engine"]), ("plugins.null_executor", settings["plugins"]["null_executor"])):
        command += [part for key, value in values.items() for part in ("--set", f"{table}.{key}={json.dumps(value)}")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        banner = ""
        for line in server.stdout:
            banner += line
            if line.startswith("serving:"):
                break
        port = int(re.search(r":(\d+)", banner.rpartition("http://")[2])[1])
        _client(port, 4, 20)  # warm
        before = _seconds(server.pid)
        found = _client(port, streams, tokens)
        used = {name: seconds - before[name] for name, seconds in _seconds(server.pid).items()}
        server.terminate()
    events = found["events"]
    return {
        "streams": streams,
        "tokens": streams * tokens,
        "events": events,
        "events_per_s": round(events / found["seconds"]),
        "tokens_per_s": round(streams * tokens / found["seconds"]),
        "events_per_api_cpu_s": round(events / used["api_process"]),
        "tokens_per_api_cpu_s": round(streams * tokens / used["api_process"]),
        "engine_cores": round(used["process"] / found["seconds"], 2),
    }


def _client(port: int, streams: int, tokens: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--read", str(port), "--streams", str(streams), "--tokens", str(tokens)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _seconds(pid: int) -> dict[str, float]:
    """CPU seconds of the processes of a server, by the last word of their module."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path(f"/proc/{child}/cmdline").read_text().split("\0")
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        found[words[-2].rpartition(".")[2]] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


# ---- loop


class Step(NamedTuple):
    """Means of a step."""

    seconds: float
    cpu: float  # seconds that the engine's thread computed


class Steps:
    """Stands in for the loop's step. Nothing runs until all requests are there, so that both kinds run the same steps; then
    the clock and this thread's CPU time are read where counting begins and where it ends."""

    def __init__(self, part: Any, streams: int, tokens: int) -> None:
        self.tokens, self._counted = tokens, (BEGIN, tokens - END)
        self._step, self._scheduler, self.streams = part.core.loop.step, part.core.scheduler, streams
        self._begun, self._steps = False, 0
        self._readings: list[tuple[float, float]] = []
        self.over: Callable[[], None] = lambda: None
        part.core.loop.step = self

    def __call__(self) -> bool:
        if not self._begun:
            self._begun = self._scheduler.unfinished == self.streams
            return False
        worked = self._step()
        if self._scheduler.running == self.streams:
            self._steps += 1
            if self._steps in self._counted:
                self._readings.append((time.perf_counter(), time.thread_time()))
        elif not self._scheduler.unfinished:
            self.over()
        return worked

    def each(self) -> Step:
        """Means: every sixteenth step of a request takes a block, and one of several sends a message."""
        (began, cpu_began), (ended, cpu_ended) = self._readings
        steps = self._counted[1] - self._counted[0]
        return Step((ended - began) / steps, (cpu_ended - cpu_began) / steps)


class Over(Exception):
    """All requests ended."""


def measure_loop(streams: int, listened: bool, step_seconds: float = 0.0) -> Step:
    """A step with an API process or with nobody. Requests and steps are the same."""
    from kernel_openai_server.engine.messages import EngineJob
    from kernel_openai_server.engine.process import EngineProcess, bound
    from kernel_openai_server.supervise import private_address

    from kernel_core.api import KernelConfig, encode, inspect_model, open_engine, resolve

    tokens = LOOP_TOKENS[step_seconds]
    plan = resolve(KernelConfig.model_validate(_settings(streams, tokens, step_seconds)))
    model = inspect_model(plan)
    with private_address() as address, bound(address) as socket:
        process = EngineProcess(socket)
        part = open_engine(plan, model, process.emit if listened else (lambda updates: None))
        steps = Steps(part, streams, tokens)
        gc.collect()
        gc.freeze()
        if listened:
            _serve(process, part, steps, encode(EngineJob(plan.to_json(), model, address)))
        else:
            _run(part, streams, tokens)
        return steps.each()


def _run(part: Any, streams: int, tokens: int) -> None:
    import numpy as np

    from kernel_core.api import Request, SamplingRow

    for i in range(streams):
        prompt = np.array(_prompt(i), np.int32)
        part.core.add(Request(f"r{i}", prompt, SamplingRow(), i, len(prompt) + tokens))
    part.core.loop.step()  # sees that all are there
    while part.core.loop.step():
        pass


def _serve(process: Any, part: Any, steps: Steps, job: bytes) -> None:
    def over() -> None:
        raise Over

    steps.over = over
    with tempfile.NamedTemporaryFile() as file:
        file.write(job)
        file.flush()
        sizes = ["--streams", str(steps.streams), "--tokens", str(steps.tokens)]
        reader = subprocess.Popen([sys.executable, __file__, "--consume", file.name, *sizes])
        with contextlib.suppress(Over):
            process.run(part)
        reader.kill()
        reader.wait()


def _prompt(i: int) -> list[int]:
    """Of lengths that let some requests take a block in every step, as it is where requests arrive by and by."""
    return [1 + i % 99] * (8 + i % 16)


async def consume(job: Path, streams: int, tokens: int) -> None:
    """An API process without HTTP."""
    from kernel_openai_server.engine.client import RemoteEngine
    from kernel_openai_server.engine.messages import EngineJob

    from kernel_core.api import ResolvedPlan, decode

    made = decode(job.read_bytes(), EngineJob)
    async with RemoteEngine(ResolvedPlan.from_json(made.plan), made.model, made.address) as engine:
        await engine.ready()

        async def one(i: int) -> None:
            params = engine.params(max_tokens=tokens, temperature=1.0, ignore_eos=True, seed=i)
            async for _ in engine.generate(_prompt(i), params):
                pass

        await asyncio.gather(*(one(i) for i in range(streams)))


def _loop(streams: int, step_seconds: float) -> dict[str, Any]:
    """Medians. The two kinds take turns, and the loss is the median of the pairs' own losses: a machine that is faster for some
    seconds, or does something else, spoils a pair and not the result."""
    pairs = [[measure_loop(streams, listened, step_seconds) for listened in (False, True)] for _ in range(PAIRS)]
    losses = [1 - alone.seconds / listened.seconds for alone, listened in pairs]
    result: dict[str, Any] = {"loss": round(median(losses), 4), "losses": [round(loss, 4) for loss in losses]}
    for kind, name in enumerate(("alone", "listened")):
        result[f"{name}_ms"] = round(median(pair[kind].seconds for pair in pairs) * 1e3, 4)
        result[f"{name}_cpu_ms"] = round(median(pair[kind].cpu for pair in pairs) * 1e3, 4)
    return result


# ---- everything


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    streams, tokens = arguments.streams, arguments.tokens
    with tempfile.TemporaryDirectory() as folder:
        _null_executor(Path(folder))
        if arguments.what in ("loop", "all"):
            result["loop"] = _loop(streams, 0.0)
            result["loop_paced"] = _loop(streams, PACE)
        if arguments.what in ("stream", "all"):
            runs = [measure_stream(streams, tokens, arguments.step_seconds) for _ in range(arguments.repeat)]
            result["stream"] = max(runs, key=lambda run: run["events_per_s"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "stream", "loop"), default="all")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=400)
    parser.add_argument("--step-seconds", type=float, default=0.012, help="what a step of the device takes")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--read", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--consume", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read is not None:
        print(json.dumps(asyncio.run(read_streams(arguments.read, arguments.streams, arguments.tokens))))
        return
    if arguments.consume is not None:
        return asyncio.run(consume(arguments.consume, arguments.streams, arguments.tokens))
    result = measure(arguments)
    (ROOT / "build" / "bench").mkdir(parents=True, exist_ok=True)
    (ROOT / "build" / "bench" / "serving.json").write_text(json.dumps(result, indent=1) + "\n")
    for name, values in result.items():
        print(name, json.dumps(values))


if __name__ == "__main__":
    main()
