"""Who may call, how much, and who watches: keys, CORS, the queue, time limits, routes and records of plugins. The application
runs in this process on a real engine, without sockets."""

import asyncio
from types import SimpleNamespace

import httpx
import pytest
from fastapi import APIRouter
from kernel_openai_server import app as module
from kernel_openai_server.access import Bodies, Exchanges, Keys
from kernel_openai_server.section import ServerSection

from kernel_core.api import AsyncEngine, ConfigError, RequestError

KEY = "sk-secret"
BODY = {"prompt": "Hello", "max_tokens": 900, "ignore_eos": True, "temperature": 1}


@pytest.fixture(scope="module")
def engine():
    engine = AsyncEngine(model="tiny-chat", device="cpu", engine={"threads": 1}, plugins={"openai_server": {}})
    yield engine
    engine.close()


class Records:
    def __init__(self, breaks: bool = False):
        self.seen, self.breaks = [], breaks

    def finished(self, exchange) -> None:
        self.seen.append(exchange)
        if self.breaks:
            raise RuntimeError("broken")


def plugin_router() -> APIRouter:
    router = APIRouter()

    @router.get("/mine")
    async def mine() -> dict[str, str]:
        raise RequestError("not like this")

    @router.get("/open")
    async def is_open() -> dict[str, str]:
        return {"a": "b"}

    is_open.public = True
    return router


def application(engine, router=None, observers=(), **section):
    """The application as the service makes it, with what plugins would add."""

    def ask(hook, **arguments):
        found = {"register_routes": [("mine", router)] if router is not None else [], "watch_http": list(observers)}
        return found[hook]

    config = SimpleNamespace(model="tiny-chat")
    context = SimpleNamespace(section=ServerSection(**section), config=config, service=lambda name, protocol: None, ask=ask)
    return module.Service(context).app(engine)


def run(app, scenario):
    async def main():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await scenario(client)

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_every_route_but_public_ones_needs_a_key(engine):
    app = application(engine, plugin_router(), api_keys=("other", KEY))

    async def scenario(client):
        for path in ("/v1/models", "/load", "/version", "/docs", "/openapi.json", "/mine", "/nothing"):
            answer = await client.get(path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
        assert (await client.post("/v1/completions", json=BODY)).json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/ping", "/open"):
            assert (await client.get(path)).status_code == 200
        for given in (f"Bearer {KEY}x", f"Basic {KEY}", KEY, "Bearer ", ""):
            assert (await client.get("/v1/models", headers={"authorization": given})).status_code == 401
        for given in (f"Bearer {KEY}", f"bearer {KEY}", "Bearer other"):
            assert (await client.get("/v1/models", headers={"authorization": given})).status_code == 200

    run(app, scenario)


def test_head_is_get_without_the_body(engine):
    records = Records()
    app = application(engine, plugin_router(), [("mine", records)], api_keys=(KEY,))

    async def scenario(client):
        for path, key in (("/health", {}), ("/open", {}), ("/v1/models", {"authorization": f"Bearer {KEY}"})):
            got, head = await client.get(path, headers=key), await client.head(path, headers=key)
            assert head.status_code == got.status_code == 200 and head.content == b"" != got.content
            for name in ("content-type", "content-length"):
                assert head.headers[name] == got.headers[name]
        assert (records.seen[-1].method, records.seen[-1].route) == ("HEAD", "/v1/models")
        assert (await client.head("/v1/models")).status_code == 401
        assert [(await client.head(f"/v1/{name}", headers=key)).status_code for name in ("completions", "nothing")] == [405, 404]

    run(app, scenario)


def test_a_key_of_the_environment_counts_too(engine, monkeypatch):
    monkeypatch.setenv("KERNEL_API_KEY", KEY)
    app = application(engine)

    async def scenario(client):
        statuses = [(await client.get("/v1/models", headers=h)).status_code for h in ({}, {"authorization": f"Bearer {KEY}"})]
        assert statuses == [401, 200]

    run(app, scenario)


def test_cors_is_off_unless_origins_are_named(engine):
    preflight = {"origin": "http://page", "access-control-request-method": "POST"}

    async def allowed(client):
        return (await client.options("/v1/models", headers=preflight)).headers.get("access-control-allow-origin")

    assert run(application(engine), allowed) is None
    assert run(application(engine, cors_origins=("http://page",), api_keys=(KEY,)), allowed) == "http://page"
    assert run(application(engine, cors_origins=("http://other",)), allowed) is None


def test_a_full_queue_answers_429_and_takes_requests_again(engine):
    app = application(engine, max_queue=1)

    async def scenario(client):
        first = asyncio.create_task(client.post("/v1/completions", json={**BODY, "max_tokens": 200}))
        while (await client.get("/load")).json()["unfinished"] == 0:
            await asyncio.sleep(0)
        refused = await client.post("/v1/completions", json=BODY)
        assert refused.status_code == 429 and refused.headers["retry-after"] and refused.json()["error"]["code"] == "queue_full"
        assert (await first).status_code == 200
        assert (await client.post("/v1/completions", json={**BODY, "max_tokens": 1})).status_code == 200

    run(app, scenario)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_with_504_or_an_event(engine, stream):
    app = application(engine, request_seconds=0.15)

    async def scenario(client):
        answer = await client.post("/v1/completions", json={**BODY, "n": 8, "stream": stream})
        if answer.status_code == 200:
            assert stream and '"code":"timeout"' in answer.text and answer.text.endswith("data: [DONE]\n\n")
        else:
            assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        assert (await client.get("/load")).json()["unfinished"] == 0

    run(app, scenario)


def test_records_tell_route_status_times_and_outputs(engine):
    records, broken = Records(), Records(breaks=True)
    app = application(engine, plugin_router(), [("good", records), ("bad", broken)])

    async def scenario(client):
        await client.post("/v1/completions", json={**BODY, "max_tokens": 3}, headers={"x-request-id": "one"})
        await client.get("/v1/models/nobody")
        assert (await client.get("/mine")).json()["error"]["message"] == "not like this"

    run(app, scenario)
    first, second, third = records.seen
    assert (first.request_id, first.method, first.route, first.status) == ("one", "POST", "/v1/completions", 200)
    assert len(first.outputs[0].outputs[0].token_ids) == 3 and 0 < first.first_byte <= first.finished
    assert second.route == "/v1/models/{name:path}" and second.status == 404 and third.status == 400
    assert len(broken.seen) == 1  # left out after it failed


def test_two_owners_of_a_route_are_a_start_up_error(engine):
    router = APIRouter()

    @router.get("/health")
    async def health() -> None: ...

    with pytest.raises(ConfigError, match="GET /health belongs to the plugins 'openai_server' and 'mine'"):
        application(engine, router)


def test_a_body_that_does_not_arrive_is_refused():
    sent = []

    async def nothing():
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    layered = Exchanges(Keys(Bodies(None, 100, 0.01), [KEY], []), (), False)
    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"authorization", f"Bearer {KEY}".encode())]}
    asyncio.run(layered(scope, nothing, send))
    assert sent[0]["status"] == 408 and (b"x-request-id") in dict(sent[0]["headers"])


def test_a_body_without_a_length_is_counted():
    sent, parts = [], [{"type": "http.request", "body": b"x" * 60, "more_body": True}] * 2

    async def send(message):
        sent.append(message)

    async def receive():
        return parts.pop()

    asyncio.run(Bodies(None, 100, 5)({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send))
    assert sent[0]["status"] == 413
