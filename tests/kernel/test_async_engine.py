"""Requests as async iterators over a device that computes nothing: each gets its own, cancelling frees, nobody hangs."""

import asyncio
import threading

import numpy as np
import pytest

from kernel_core.async_engine import AsyncEngine
from kernel_core.config import EngineConfig
from kernel_core.engine import Assembly, EngineCore
from kernel_core.errors import EngineDeadError, RequestError
from kernel_core.intake import Intake, Limits
from kernel_core.plan import KVGroup
from kernel_core.request import SamplingParams
from kernel_core.testing.null import NullExecutor, NullScript, null_tokens

VOCAB, LENGTH = 1000, 2000


class GatedExecutor(NullExecutor):
    """Steps run only while `go` is set, so that a test decides what happens between them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.go = threading.Event()
        self.go.set()
        self.steps = 0

    def submit(self, plan):
        assert self.go.wait(10)
        self.steps += 1
        return super().submit(plan)


class Made:
    def __init__(self, script: NullScript | None = None, **config):
        settings = EngineConfig(**{"max_requests": 8, "max_tokens_per_step": 64, "kv_blocks": 400, **config})
        self.executor = GatedExecutor((KVGroup("full", 16, 1, ("x",)),), VOCAB, LENGTH, script=script)
        limits = Limits(LENGTH, VOCAB, 20)

        def core(emit) -> EngineCore:
            self.core = EngineCore(settings, self.executor, emit)
            return self.core

        self.engine = AsyncEngine(assembly=Assembly(core, lambda core: Intake(limits, None, (), {}), None))

    def nothing_held(self) -> bool:
        scheduler = self.core.scheduler
        scheduler.kv.reclaim(scheduler.slots.last_plan)
        return scheduler.unfinished == 0 and scheduler.free_blocks == (self.core.allocation.num_blocks[0] - 1,)


def params(seed: int, max_tokens: int, **more) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=max_tokens, detokenize=False, **more)


def expected(prompt: list[int], seed: int, max_tokens: int) -> list[int]:
    return null_tokens(np.uint64(seed), np.arange(len(prompt), len(prompt) + max_tokens), VOCAB).tolist()


async def collect(engine: AsyncEngine, prompt: list[int], seed: int, max_tokens: int, **more) -> list[int]:
    seen: list[int] = []
    async for output in engine.generate(prompt, params(seed, max_tokens), **more):
        ids = output.outputs[0].token_ids
        assert ids[: len(seen)] == seen, "an output lost what an earlier one had"
        seen = ids
    assert output.finished
    return seen


def run(made: Made, scenario) -> None:
    async def within():
        async with made.engine:
            await asyncio.wait_for(scenario, 30)

    asyncio.run(within())


@pytest.mark.parametrize("overlap", [False, True])
def test_many_at_once_each_get_their_own(overlap):
    made = Made(overlap=overlap)

    async def scenario():
        prompts = [[i] * (1 + 7 * i) for i in range(20)]
        results = await asyncio.gather(*(collect(made.engine, p, i, 5 + i) for i, p in enumerate(prompts)))
        assert results == [expected(p, i, 5 + i) for i, p in enumerate(prompts)]

    run(made, scenario())
    assert made.nothing_held()


def test_two_event_loops_may_share_an_engine():
    made = Made()
    results = {}

    def other(seed: int) -> None:
        results[seed] = asyncio.run(collect(made.engine, [1, 2], seed, 30))

    threads = [threading.Thread(target=other, args=(seed,)) for seed in (5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    made.engine.close()
    assert results == {seed: expected([1, 2], seed, 30) for seed in (5, 6)}


@pytest.mark.parametrize("how", ["cancel", "break", "aclose"])
def test_an_iterator_that_ends_early_aborts_its_request_and_frees_its_blocks(how):
    made = Made()

    async def leave() -> None:
        iterator = made.engine.generate([1, 2, 3], params(1, 1500))
        async for _ in iterator:
            if how == "break":
                break
            if how == "aclose":
                await iterator.aclose()

    async def scenario():
        task = asyncio.create_task(leave())
        other = asyncio.create_task(collect(made.engine, [4], 9, 300))
        if how == "cancel":
            while not made.executor.steps:
                await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError) if how == "cancel" else _nothing():
            await task
        assert await other == expected([4], 9, 300)
        await collect(made.engine, [1], 1, 1)
        assert made.core.scheduler.unfinished == 0

    run(made, scenario())
    assert made.executor.steps < 1000 and made.nothing_held()


class _nothing:
    def __enter__(self): ...
    def __exit__(self, *error): ...


def test_abort_ends_the_iterator_with_what_there_is():
    made = Made()

    async def scenario():
        outputs = []
        async for output in made.engine.generate([1], params(1, 1500), "x"):
            outputs.append(output)
            await made.engine.abort("x")
        assert outputs[-1].finished and outputs[-1].outputs[0].finish_reason == "abort"
        assert outputs[-1].outputs[0].token_ids == expected([1], 1, len(outputs[-1].outputs[0].token_ids))

    run(made, scenario())


def test_errors_of_a_request_reach_only_its_own_iterator():
    made = Made(NullScript(fail={"bad": 5}))

    async def scenario():
        good = asyncio.create_task(collect(made.engine, [1, 2], 3, 200))
        with pytest.raises(RequestError, match="the prompt is empty"):
            await collect(made.engine, [], 1, 1)
        outputs = [output async for output in made.engine.generate([1, 2], params(1, 50), "bad")]
        assert outputs[-1].error == "logits are not finite" and outputs[-1].finished
        made.executor.go.clear()
        first = asyncio.create_task(collect(made.engine, [7], 7, 5, request_id="same"))
        await asyncio.sleep(0)
        second = made.engine.generate([7], params(7, 5), "same")
        made.executor.go.set()
        refused = await asyncio.gather(anext(second), first, return_exceptions=True)
        assert sum(isinstance(result, RequestError) for result in refused) <= 1
        assert await good == expected([1, 2], 3, 200)

    run(made, scenario())


def test_a_dead_worker_ends_every_iterator_and_refuses_the_next():
    made = Made(NullScript(die_at=20))

    async def scenario():
        tasks = [collect(made.engine, [i], i, 500) for i in range(5)]
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(result) for result in results] == [EngineDeadError] * 5
        assert {str(result) for result in results} == {"the null worker died"}
        with pytest.raises(EngineDeadError, match="the null worker died"):
            await collect(made.engine, [1], 1, 1)
        assert made.engine.dead == "the null worker died"

    run(made, scenario())


def test_closing_ends_iterators_that_wait():
    made = Made()

    async def scenario():
        made.executor.go.clear()
        task = asyncio.create_task(collect(made.engine, [1], 1, 5))
        while not made.engine._streams:
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(asyncio.to_thread(made.engine.close))
        while not made.engine._closing:
            await asyncio.sleep(0.001)
        made.executor.go.set()
        with pytest.raises(EngineDeadError, match="closed"):
            await task
        await closing

    run(made, scenario())


def test_nothing_runs_without_requests_and_the_next_one_wakes_it():
    made = Made()

    async def scenario():
        assert await collect(made.engine, [1], 1, 3) == expected([1], 1, 3)
        before = made.executor.steps
        with made.engine._work:
            assert not made.engine._inbox
        await asyncio.sleep(0.05)
        assert made.executor.steps == before
        assert await collect(made.engine, [1], 2, 3) == expected([1], 2, 3)

    run(made, scenario())


def test_calls_run_between_steps_and_bring_back_their_answer_or_error():
    made = Made()

    async def scenario():
        assert await made.engine.call("any.name", b"payload") == [b"payload"]

    run(made, scenario())
