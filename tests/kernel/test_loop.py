"""Both loops give the same tokens, tell observers what happened, and end everybody when the worker dies."""

import logging
import time

import numpy as np
import pytest

from kernel_core.config import EngineConfig
from kernel_core.errors import EngineDeadError
from kernel_core.loop import OverlappedLoop, PlainLoop
from kernel_core.plan import Allocation, KVGroup, SamplingRow
from kernel_core.request import FINISH_REASONS, Request
from kernel_core.scheduler import Scheduler
from kernel_core.testing.null import NullExecutor, NullScript, null_tokens
from kernel_core.testing.step_bench import run as bench

GROUPS = (KVGroup("full", 4, 1, ("f",)),)


class Watcher:
    def __init__(self):
        self.arrivals, self.steps, self.ends = [], [], []

    def added(self, arrival):
        self.arrivals.append(arrival)

    def step(self, record):
        assert record.plan.plan_id == record.result.plan_id and record.committed_at >= record.planned_at
        self.steps.append((record.plan.plan_id, record.running, record.waiting, record.free_blocks))

    def finished(self, request_id, reason, num_prompt, num_output):
        self.ends.append((request_id, reason, num_prompt, num_output))


class Broken(Watcher):
    def step(self, record):
        raise ValueError("broken observer")


def engine(depth, script=None, observers=(), requests=6):
    allocation = Allocation((30,), 3, 40, 16, 2)
    executor = NullExecutor(GROUPS, 100, 40, 2, script=script, check_kv=True)
    executor.allocate(allocation)
    scheduler = Scheduler(EngineConfig(max_tokens_per_step=16), GROUPS, allocation, executor.report.capabilities, depth=depth)
    tokens, ends, errors = {}, {}, {}

    def emit(updates):
        for i, name in enumerate(updates.requests):
            tokens.setdefault(name, []).extend(updates.tokens[updates.offsets[i] : updates.offsets[i + 1]].tolist())
            if updates.finish[i]:
                ends[name] = FINISH_REASONS[updates.finish[i]]
        errors.update(updates.errors)

    loop = PlainLoop(scheduler, executor, emit, observers)
    if depth > 1:
        loop = OverlappedLoop(scheduler, executor, emit, observers, depth)
    for i in range(requests):
        scheduler.add(Request(f"r{i}", np.arange(4 + i, dtype=np.int32), SamplingRow(), i, 4 + i + 10))
    return loop, scheduler, tokens, ends, errors


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_steps_until_there_is_nothing_to_do(depth):
    watcher = Watcher()
    loop, scheduler, tokens, ends, _ = engine(depth, NullScript(lambda key, p: p % 3), [watcher])
    while loop.step():
        pass
    assert tokens == {f"r{i}": null_tokens(i, np.arange(4 + i, 14 + i), 100).tolist() for i in range(6)}
    assert ends == {f"r{i}": "length" for i in range(6)} and scheduler.free_blocks == (29,)
    assert [s[0] for s in watcher.steps] == list(range(1, len(watcher.steps) + 1))
    assert sorted(watcher.ends) == [(f"r{i}", "length", 4 + i, 10) for i in range(6)]
    assert not loop.step()


def test_the_overlapped_loop_submits_the_next_step_before_it_waits_for_the_last():
    loop, _, _, _, _ = engine(2)
    events = []
    submit, finish = loop.executor.submit, loop.executor.finish
    loop.executor.submit = lambda plan: (events.append(("submit", plan.plan_id)), submit(plan))[1]
    loop.executor.finish = lambda plan: (events.append(("result", plan.plan_id)), finish(plan))[1]
    loop.step()
    loop.step()
    assert events == [("submit", 1), ("submit", 2), ("result", 1), ("submit", 3), ("result", 2)]
    loop.drain()
    assert events[-1] == ("result", 3) and len(events) == 6


def test_an_idle_loop_reports_aborts():
    watcher = Watcher()
    loop, scheduler, _, ends, _ = engine(1, observers=[watcher], requests=1)
    scheduler.abort(["r0"])
    assert loop.step() and ends == {"r0": "abort"} and watcher.ends == [("r0", "abort", 4, 0)]
    assert not loop.step() and not watcher.steps


def test_an_observer_that_raises_is_disabled_and_reported_once(caplog):
    watcher = Watcher()
    loop, _, _, ends, _ = engine(1, observers=[Broken(), watcher])
    with caplog.at_level(logging.ERROR):
        while loop.step():
            pass
    assert len(caplog.records) == 1 and "Broken" in caplog.text and "broken observer" in caplog.text
    assert len(ends) == 6 and len(watcher.ends) == 6


@pytest.mark.parametrize("depth", [1, 2])
def test_a_dying_worker_ends_all_requests_and_the_loop(depth):
    watcher = Watcher()
    loop, scheduler, _, ends, errors = engine(depth, NullScript(die_at=3), [watcher])
    with pytest.raises(EngineDeadError, match="null worker died"):
        while loop.step():
            pass
    assert ends == {f"r{i}": "error" for i in range(6)} and set(errors.values()) == {"the null worker died"}
    assert len(watcher.ends) == 6 and scheduler.unfinished == 0
    with pytest.raises(EngineDeadError, match="null worker died"):
        loop.step()


def test_a_failing_emit_ends_the_loop_with_its_cause():
    loop, *_ = engine(1)
    calls = []

    def emit(updates):
        calls.append(updates)
        if len(calls) == 1:
            raise KeyError("face")

    loop.outlet._emit = emit
    with pytest.raises(EngineDeadError, match=r"loop failed.*face") as caught:
        loop.step()
    assert isinstance(caught.value.__cause__, KeyError) and len(calls[1].requests) == 6


def test_counts_are_checked_when_the_loop_comes_to_rest():
    loop, scheduler, _, _, _ = engine(1, requests=1)
    while scheduler.plannable():
        loop.step()
    scheduler.kv.groups[0].pool.free -= 1
    with pytest.raises(EngineDeadError, match="a block is lost"):
        loop.step()


@pytest.mark.parametrize(("running", "churn"), [(256, 0.0), (1024, 0.0), (256, 0.02), (1024, 0.02)])
def test_plan_and_commit_stay_in_their_budget(running, churn, capsys):
    """Median milliseconds on a quiet machine: 0.1 / 0.25 steady; with 2 % replaced 0.4 / 1.0. The test allows thrice that, for
    slow and busy ones, and takes the best of three."""
    budget = {(256, 0.0): 0.1, (1024, 0.0): 0.25, (256, 0.02): 0.4, (1024, 0.02): 1.0}[running, churn]
    found = bench(running, churn, steps=60)
    for _ in range(2):
        if found["plan_commit_ms"] > budget:
            found = min(found, bench(running, churn, steps=60), key=lambda f: f["plan_commit_ms"])
    with capsys.disabled():
        print(f"\nplan + commit, {running} running, churn {churn}: {found['plan_commit_ms']} ms (budget {budget})", end=" ")
    assert found["plan_commit_ms"] <= 3 * budget


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_family_whose_shared_prompt_fills_the_pool_gives_it_up_and_ends(depth):
    allocation = Allocation((2,), 2, 48, 16)  # one block, which holds a whole request
    groups = (KVGroup("full", 48, 1, ("f",)),)
    executor = NullExecutor(groups, 100, 48, check_kv=True)
    executor.allocate(allocation)
    capabilities = executor.report.capabilities
    scheduler = Scheduler(EngineConfig(max_tokens_per_step=16), groups, allocation, capabilities, depth=depth)
    ended = []
    loop = OverlappedLoop(scheduler, executor, lambda updates: ended.extend(updates.finish[updates.finish > 0]), depth=depth)
    for i in range(3):
        scheduler.add(Request(f"c{i}", np.arange(13, dtype=np.int32), SamplingRow(), i, 20, family="c"))
    for _ in range(200):
        loop.step()
    assert [FINISH_REASONS[code] for code in ended] == ["length"] * 3
    assert scheduler.free_blocks == (1,)


def test_observers_are_told_what_arrives():
    watcher = Watcher()
    loop, *_ = engine(1, observers=[watcher])
    before = time.monotonic()
    loop.outlet.added(Request("x", np.arange(4, dtype=np.int32), SamplingRow(), 0, 14, priority=2, family="f"))
    (arrival,) = watcher.arrivals
    assert (arrival.id, arrival.family, arrival.num_prompt, arrival.max_tokens, arrival.priority) == ("x", "f", 4, 10, 2)
    assert before <= arrival.at <= time.monotonic()
