"""A long run of clients that connect, stream, go away at random and send nonsense, while the engine is killed twice. Afterwards
every block is free, memory is flat and no request hung. SOAK_SECONDS says how long (600), SOAK_CLIENTS how many (200)."""

import asyncio
import json
import os
import random
import time
from collections import Counter

import httpx
import psutil
import pytest

SECONDS = float(os.environ.get("SOAK_SECONDS", "600"))
CLIENTS = int(os.environ.get("SOAK_CLIENTS", "200"))
LONGEST = float(os.environ.get("SOAK_LONGEST", "180"))  # seconds that no single request may take
KILLS = 2
QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]
NONSENSE = [b"{", b"[]", b'{"prompt": 3}', b'{"prompt": "x", "nope": 1}', b'{"prompt": "x", "temperature": -1}', b"\xff", b""]
JSON = {"content-type": "application/json"}


class Crowd:
    """All clients, and what happened to them."""

    def __init__(self, url: str, until: float):
        self.url, self.until, self.seen = url, until, Counter()
        self.slowest = 0.0

    async def client(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.until:
            act = draw.choices((self.stream, self.whole, self.leave, self.nonsense), (4, 2, 3, 1))[0]
            started = time.monotonic()
            async with httpx.AsyncClient(base_url=self.url, timeout=LONGEST, trust_env=False, verify=False) as http:
                try:
                    await asyncio.wait_for(act(http, draw), LONGEST)
                except TimeoutError:
                    self.seen[f"hung: {act.__name__}"] += 1
                except httpx.TransportError as error:
                    self.seen[type(error).__name__] += 1
            self.slowest = max(self.slowest, time.monotonic() - started)
            await asyncio.sleep(draw.random() * 0.5)

    def body(self, draw: random.Random, stream: bool) -> dict:
        more = {"n": 2} if draw.random() < 0.2 else {}
        return {
            "messages": QUESTION,
            "max_tokens": draw.randint(1, 60),
            "stream": stream,
            "temperature": 1,
            "ignore_eos": True,
            **more,
        }

    async def stream(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        async with http.stream("POST", "/v1/chat/completions", json=self.body(draw, True)) as answer:
            if answer.status_code == 200:
                data = [line[6:] async for line in answer.aiter_lines() if line.startswith("data: ")]
                assert data[-1] == "[DONE]"
                self.seen["stream with an error" if "error" in json.loads(data[-2]) else "whole stream"] += 1
            else:
                self.seen[answer.status_code] += 1

    async def whole(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        path = "/v1/responses" if draw.random() < 0.3 else "/v1/chat/completions"
        body = {"input": "Hello!", "max_output_tokens": 20} if "responses" in path else self.body(draw, False)
        self.seen[(await http.post(path, json=body)).status_code] += 1

    async def leave(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        """Go away in the middle of a stream, or while nothing came yet."""
        if draw.random() < 0.5:
            async with http.stream("POST", "/v1/completions", json={"prompt": "Hi", "max_tokens": 500, "stream": True}) as answer:
                pieces = answer.aiter_raw()
                for _ in range(draw.randint(0, 5)):
                    await anext(pieces, None)
        else:
            waiting = asyncio.ensure_future(http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 500}))
            await asyncio.wait([waiting], timeout=draw.random())
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
        self.seen["left"] += 1

    async def nonsense(self, http: httpx.AsyncClient, draw: random.Random) -> None:
        answer = await http.post("/v1/completions", content=draw.choice(NONSENSE), headers=JSON)
        assert answer.status_code in (400, 429, 503), answer.text
        self.seen["nonsense"] += 1


def processes(server) -> dict[str, psutil.Process]:
    """The engine and the API process, by the last word of their module."""
    children = psutil.Process(server.process.pid).children()
    return {child.cmdline()[-1].rpartition(".")[2]: child for child in children}


async def soak(server) -> tuple[Crowd, list[int]]:
    """→ the crowd, and the API process's memory after a third of the time, two thirds and at the end."""
    started = time.monotonic()
    crowd = Crowd(server.url, started + SECONDS)
    clients = [asyncio.ensure_future(crowd.client(seed)) for seed in range(CLIENTS)]
    memory = []
    for third in range(1, KILLS + 1):
        await asyncio.sleep(max(0.0, started + SECONDS * third / (KILLS + 1) - time.monotonic()))
        memory.append(processes(server)["api_process"].memory_info().rss)
        processes(server)["process"].kill()
    await asyncio.gather(*clients)
    memory.append(processes(server)["api_process"].memory_info().rss)
    return crowd, memory


async def all_free(url: str) -> dict:
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        for _ in range(500):
            load = (await http.get("/load")).json()
            if load.get("unfinished") == load.get("running") == load.get("waiting") == 0:
                return load
            await asyncio.sleep(0.1)
    raise AssertionError(load)


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_a_crowd_leaves_nothing_behind(start_server):
    server = start_server("--set", "plugins.openai_server.stored_responses=100", "--set", "engine.max_requests=64")
    crowd, memory = asyncio.run(soak(server))
    print(f"{dict(crowd.seen)}, slowest {crowd.slowest:.1f} s, API process {[size >> 20 for size in memory]} MiB")
    load = asyncio.run(all_free(server.url))
    assert load["free_blocks"] == load["num_blocks"]
    assert crowd.seen["whole stream"] and crowd.seen["left"] and crowd.seen["nonsense"] and crowd.slowest < LONGEST
    assert 500 not in crowd.seen and not [name for name in crowd.seen if str(name).startswith("hung")]
    assert memory[-1] - memory[-2] < 24 << 20, "memory grows"
