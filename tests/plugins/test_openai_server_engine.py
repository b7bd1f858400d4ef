"""`RemoteEngine` and the engine process: answers as in one process, death and return, vanished readers. The device computes
nothing; what its tokens must be is computed by `null_tokens`."""

import asyncio
import contextlib
import importlib.util
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernel_openai_server.engine import messages
from kernel_openai_server.engine.client import RemoteEngine
from kernel_openai_server.engine.joining import Joiner, Steady
from kernel_openai_server.engine.messages import EngineJob
from kernel_openai_server.engine.routing import Owners, take_rows
from kernel_openai_server.supervise import Child, StartError, private_address

from kernel_core.api import (
    EngineDeadError,
    KernelConfig,
    KernelError,
    Logprobs,
    RequestError,
    Updates,
    encode,
    inspect_model,
    resolve,
)
from kernel_core.testing.null import null_tokens

VOCAB = 200
PATIENCE = 60


@pytest.fixture(scope="module")
def null_executor(tmp_path_factory):
    """The plugin `null_executor`, installed for this process and its children."""
    file = Path(__file__).parents[1] / "benchmarks" / "null_executor.py"
    spec = importlib.util.spec_from_file_location("null_executor", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = str(module.install(tmp_path_factory.mktemp("null")))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", folder)
        yield


class Server:
    """A plan on the null executor, an address, and what is started there."""

    def __init__(self, model: Path, address: str, **section):
        plugins = {"null_executor": {"vocab_size": VOCAB, "max_model_len": 1024, **section}}
        settings = {"max_requests": 8, "kv_blocks": 600, "sampling_defaults": "kernel"}
        data = {"model": str(model), "executor": "null_executor", "engine": settings, "plugins": plugins}
        self.plan = resolve(KernelConfig.model_validate(data))
        self.model, self.address = inspect_model(self.plan), address

    async def start(self) -> Child:
        return await Child.start("engine.process", "engine", encode(EngineJob(self.plan.to_json(), self.model, self.address)))

    def face(self, name: str | None = None) -> RemoteEngine:
        return RemoteEngine(self.plan, self.model, self.address, name)


@pytest.fixture
def server(byte_model, null_executor):
    with private_address() as address:
        yield lambda **section: Server(byte_model, address, **section)


def run(scenario) -> None:
    asyncio.run(asyncio.wait_for(scenario, PATIENCE))


@contextlib.asynccontextmanager
async def running(server: Server):
    child = await server.start()
    try:
        async with server.face() as engine:
            await child.ready()
            await engine.ready()
            yield child, engine
    finally:
        await child.end(10)


def expected(prompt: list[int], seed: int, count: int) -> list[int]:
    return null_tokens(np.uint64(seed), np.arange(len(prompt), len(prompt) + count), VOCAB).tolist()


async def last(outputs):
    """The last output of an iterator."""
    return [output async for output in outputs][-1]


async def collect(engine: RemoteEngine, prompt: list[int], seed: int, count: int, **more) -> list[int]:
    sampling = {"temperature": 1.0, "ignore_eos": True, "seed": seed, "max_tokens": count}
    async for output in engine.generate(prompt, engine.params(**sampling), **more):
        ids = list(output.outputs[0].token_ids)
        done = output.finished
    assert done and output.error is None
    return ids


async def all_free(engine: RemoteEngine) -> None:
    """Nothing runs and every block is free; within a few steps."""
    while True:
        load = await engine.load()
        if load.running == load.waiting == 0 and load.free_blocks == load.num_blocks:
            return
        await asyncio.sleep(0.01)


def test_many_requests_each_get_their_own_tokens_and_leave_nothing(server):
    async def scenario():
        async with running(server()) as (_, engine):
            prompts = [[1 + i] * (1 + 5 * i) for i in range(30)]
            results = await asyncio.gather(*(collect(engine, p, i, 3 + i) for i, p in enumerate(prompts)))
            assert results == [expected(p, i, 3 + i) for i, p in enumerate(prompts)]
            assert engine.unfinished == 0 and engine.max_model_len == 1024 and "KV for" in engine.summary
            await engine.reset_cache()
            await all_free(engine)

    run(scenario())


def test_text_stop_strings_and_choices_are_made_in_the_face(server):
    async def scenario():
        async with running(server()) as (_, engine):
            sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 60, "ignore_eos": True}
            whole = await last(engine.generate("abc", engine.params(**sampling)))
            text = whole.outputs[0].text
            assert text == engine.codec.decode(expected([0, 0, 0], 5, 60)) and whole.prompt == "abc"
            stop = text[5:8]
            cut = await last(engine.generate("abc", engine.params(**sampling, stop=stop)))
            assert cut.outputs[0].text == text[: text.index(stop)] and cut.outputs[0].stop_reason == stop
            three = await last(engine.generate("abc", engine.params(**{**sampling, "n": 3, "max_tokens": 4})))
            assert [c.token_ids for c in three.outputs] == [expected([0] * 3, 5 + i, 4) for i in range(3)]
            await all_free(engine)

    run(scenario())


def test_invalid_requests_are_refused_and_the_others_go_on(server):
    async def scenario():
        async with running(server(step_seconds=0.002)) as (_, engine):
            other = asyncio.create_task(collect(engine, [7], 7, 300, request_id="same"))
            for prompt, fields, message in (([], {}, "empty"), ([VOCAB], {}, "token id"), ("x", {"nonsense": 1}, "nonsense")):
                with pytest.raises(RequestError, match=message):
                    await anext(engine.generate(prompt, engine.params(**fields)))
            while not engine.unfinished:
                await asyncio.sleep(0)
            with pytest.raises(RequestError, match="running already"):
                await collect(engine, [7], 7, 3, request_id="same")
            assert await other == expected([7], 7, 300)

    run(scenario())


def test_a_request_that_another_api_process_has_is_refused_by_the_engine(server):
    """Ids are the engine's, not a process's; the refusal reaches the one who asked."""

    async def scenario():
        here = server(step_seconds=0.002)
        async with running(here) as (_, engine), here.face("second") as second:
            await second.ready()
            first = asyncio.create_task(collect(engine, [7], 7, 300, request_id="same"))
            while (await second.load()).running == 0:
                await asyncio.sleep(0)
            with pytest.raises(RequestError, match="running already"):
                await collect(second, [7], 7, 3, request_id="same")
            await second.abort("same")  # nor can it end what belongs to another
            own = await asyncio.gather(*(collect(second, [9], i, 40) for i in range(5)))
            assert own == [expected([9], i, 40) for i in range(5)] and await first == expected([7], 7, 300)

    run(scenario())


@pytest.mark.parametrize("how", ["close", "cancel", "abort"])
def test_ending_early_frees_everything(server, how):
    async def scenario():
        async with running(server(step_seconds=0.005)) as (_, engine):
            iterator = engine.generate([1], engine.params(max_tokens=1000, temperature=1.0, ignore_eos=True), "x")
            await anext(iterator)
            if how == "close":
                await iterator.aclose()
            elif how == "cancel":
                task = asyncio.create_task(collect(engine, [2], 2, 1000))
                await asyncio.sleep(0)
                task.cancel()
                await iterator.aclose()
            else:
                await engine.abort("x")
                rest = [output async for output in iterator]
                assert rest[-1].outputs[0].finish_reason == "abort"
            await all_free(engine)
            assert engine.unfinished == 0

    run(scenario())


def test_calls_bring_back_answers_and_errors(server):
    async def scenario():
        async with running(server()) as (_, engine):
            assert await engine.call("any.name", b"payload") == [b"payload"]
            with pytest.raises(AttributeError, match="no method 'nonsense'"):
                await engine.verb("nonsense")

    run(scenario())


def test_an_error_of_a_call_keeps_its_class():
    from kernel_openai_server.engine.client import _error

    assert type(_error("RequestError", "x")) is RequestError
    assert type(_error("ZeroDivisionError", "x")) is KernelError and str(_error("OSError", "x")) == "OSError: x"


def test_killing_the_engine_ends_requests_and_the_next_engine_serves(server):
    async def scenario():
        here = server(step_seconds=0.005)
        async with running(here) as (child, engine):
            tasks = [asyncio.create_task(collect(engine, [i], i, 900)) for i in range(1, 5)]
            while engine.unfinished < 4:
                await asyncio.sleep(0)
            child.signal(signal.SIGKILL)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert [type(result) for result in results] == [EngineDeadError] * 4
            assert "gone" in engine.dead and engine.unfinished == 0
            with pytest.raises(EngineDeadError):
                await collect(engine, [1], 1, 1)
            with pytest.raises(EngineDeadError):
                await engine.call("any.name")
            second = await here.start()
            await engine.ready()
            assert engine.dead is None and await collect(engine, [1], 1, 5) == expected([1], 1, 5)
            await second.end(10)

    run(scenario())


def test_an_api_process_that_vanishes_takes_its_requests_with_it(server):
    async def scenario():
        here = server(step_seconds=0.005)
        async with running(here) as (_, engine):
            async with here.face("second") as second:
                await second.ready()
                task = asyncio.create_task(collect(second, [3], 3, 1000))
                while (await engine.load()).running == 0:
                    await asyncio.sleep(0)
                second._link.close()  # as a process that is killed
                task.cancel()
            own = asyncio.create_task(collect(engine, [1], 1, 50))
            await all_free(engine)
            assert await own == expected([1], 1, 50)

    run(scenario())


def test_the_engine_process_ends_with_its_parent(server):
    async def scenario():
        async with running(server(step_seconds=0.005)) as (child, engine):
            task = asyncio.create_task(collect(engine, [3], 3, 1000))
            while not engine.unfinished:
                await asyncio.sleep(0)
            child.process.stdin.close()  # what the end of the parent does
            await child.process.wait()
            with pytest.raises(EngineDeadError):
                await task

    run(scenario())


def test_a_failing_start_reports_the_engines_own_error(server):
    async def scenario():
        child = await server(refuses="the model does not fit: buy memory").start()
        with pytest.raises(StartError, match="the model does not fit: buy memory"):
            await child.ready()
        assert child.fate() == "exit code 1"

    run(scenario())


# ---- dividing updates


@st.composite
def divided(draw):
    """Updates of some rows, and the owner (0 to 2, or nobody) of each."""
    owners = draw(st.lists(st.integers(-1, 2), min_size=1, max_size=8))
    counts = [draw(st.integers(0, 3)) for _ in owners]
    finish = [draw(st.integers(0, 4)) for _ in owners]
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    rows = np.repeat(np.arange(len(owners)), counts).astype(np.int32)
    at = np.arange(rows.size, dtype=np.int32)
    logprobs = Logprobs(rows, at + 7, at[:, None], at[:, None].astype(np.float32), at + 1)
    names = tuple(f"r{i}" for i in range(len(owners)))
    errors = {names[i]: "bad" for i, code in enumerate(finish) if code == 4}
    number = np.arange(len(owners), dtype=np.int32)
    return owners, Updates(
        names, at * 10, offsets, np.array(finish, np.int32), number, dict.fromkeys(names, 3), logprobs, errors=errors
    )


def rows_of(updates: Updates) -> dict:
    """Everything that is said of each request."""
    found = {}
    for i, name in enumerate(updates.requests):
        tokens = updates.tokens[updates.offsets[i] : updates.offsets[i + 1]].tolist()
        mine = updates.logprobs.row == i
        logprobs = updates.logprobs.position[mine].tolist(), updates.logprobs.token_ids[mine, 0].tolist()
        found[name] = (tokens, int(updates.finish[i]), int(updates.stop_token[i]), updates.cached.get(name), logprobs)
        found[name] += (updates.errors.get(name),)
    return found


@given(divided())
def test_every_api_process_hears_of_its_own_sequences_only(case):
    owners, updates = case
    book = Owners()
    for name, owner in zip(updates.requests, owners):
        if owner >= 0:
            book.add(b"%d" % owner, [name])
    whole, told = rows_of(updates), dict(book.divide(updates))
    alone = len({owner for owner in owners if owner >= 0}) == 1
    for owner in {owner for owner in owners if owner >= 0}:
        own = {name for name, who in zip(updates.requests, owners) if who == owner}
        heard = rows_of(messages.decode(encode(told[b"%d" % owner]), Updates))
        assert heard == (whole if alone else {name: whole[name] for name in own})
        running_on = {name for name in own if whole[name][1] == 0}
        assert set(book.keep_own(b"%d" % owner, own)) == running_on
        assert book.forget(b"%d" % owner) == sorted(running_on)


def test_taking_all_rows_changes_nothing():
    z = np.zeros(0, np.int32)
    updates = Updates((), z, np.zeros(1, np.int32), z, z)
    assert take_rows(updates, z) is updates


@st.composite
def short_steps(draw):
    """Steps of up to three requests, mostly alike; those that end are in no later one."""
    running, steps = ("a", "b", "c"), []
    for number in range(draw(st.integers(1, 8))):
        finish = np.array([draw(st.sampled_from([0] * 9 + [1])) for _ in running], np.int32)
        counts = [draw(st.sampled_from([1, 1, 1, 1, 2, 0 if code else 1])) for code in finish]  # who does not end gets something
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        tokens = 100 * number + np.arange(offsets[-1], dtype=np.int32)
        logprobs = draw(st.sampled_from([None] * 5 + [Logprobs(*(np.zeros((1, 1), np.int32),) * 5)]))
        steps.append(Updates(running, tokens, offsets, finish, np.where(finish, number, -1).astype(np.int32), logprobs=logprobs))
        if finish.any():
            running = tuple(name for name, code in zip(running, finish) if not code)
    return steps


def joined(steps: list[Updates]) -> list[Updates | Steady]:
    joiner = Joiner()
    for updates in steps:
        joiner.add(updates)
    news = joiner.take()
    assert not joiner.take()
    return news


@given(short_steps())
def test_joined_steps_say_the_same_in_the_same_order(steps):
    told, heard = {}, {}
    for updates in steps:
        tell(told, updates)
    whole = [news.updates() if isinstance(news, Steady) else news for news in joined(steps)]
    for updates in whole:
        tell(heard, messages.decode(encode(updates), Updates))
    assert heard == told
    assert [u.logprobs for u in whole if u.logprobs] == [u.logprobs for u in steps if u.logprobs]


def tell(news: dict, updates: Updates) -> None:
    """What readers hear of each request, in its order."""
    for i, name in enumerate(updates.requests):
        tokens, end = news.setdefault(name, ([], []))
        assert not end, f"{name} ended before"
        tokens.extend(updates.tokens[updates.offsets[i] : updates.offsets[i + 1]].tolist())
        if updates.finish[i]:
            end.append((int(updates.finish[i]), int(updates.stop_token[i])))


def steady(token: int, names: tuple[str, ...], **more) -> Updates:
    count = len(names)
    columns = np.full(count, token, np.int32), np.arange(count + 1, dtype=np.int32), np.zeros(count, np.int32)
    return Updates(names, *columns, np.full(count, -1, np.int32), **more)


def test_steady_steps_become_one_and_all_others_stay_as_they_are():
    both, one = ("a", "c"), ("c",)
    first = steady(4, one, cached={"c": 1})
    steps = [steady(1, both), steady(2, both), steady(3, one), first, steady(5, one), steady(6, one)]
    news = joined(steps)
    assert [n.tokens.tolist() for n in news] == [[[1, 1], [2, 2]], [[3]], [4], [[5], [6]]]
    assert news[2] is first and news[0].updates().offsets.tolist() == [0, 2, 4]
    assert len(joined([steady(1, one)] * 200)) == 4  # bounded
    joiner = Joiner()
    for updates, urgent in zip(steps, (False, False, False, True, True, True)):
        joiner.add(updates)
        assert joiner.urgent is urgent
    assert joiner.take() and not joiner.urgent


def test_steady_steps_are_divided_among_api_processes():
    names = ("a", "b", "c")
    book, (news,) = Owners(), joined([steady(1, names), steady(2, names)])
    assert list(book.divide(news)) == []
    book.add(b"0", ["a", "c"])
    book.add(b"1", ["b"])
    parts = {identity: (part.requests, part.tokens.tolist()) for identity, part in book.divide(news)}
    assert parts == {b"0": (("a", "c"), [[1, 1], [2, 2]]), b"1": (("b",), [[1], [2]])}
