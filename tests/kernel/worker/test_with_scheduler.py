"""The real scheduler, blocks and loops on the real runner with the toy model: what every request gets is what it gets alone,
whatever is chunked, preempted, forked, drafted or in flight."""

import numpy as np
import pytest
from test_speculation import ScriptedDrafter
from toy_worker import make_runner, oracle

from kernel_core.config import EngineConfig
from kernel_core.loop import OverlappedLoop, PlainLoop
from kernel_core.plan import PROMPT_LOGPROBS, Allocation, Capabilities, SamplingRow
from kernel_core.request import FINISH_REASONS, Request
from kernel_core.scheduler import Scheduler

NEW, LONGEST = 12, 28
PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(20, 33)), [7, 7], [5, 6, 7, 8, 9, 10]]
SAMPLINGS = [{}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 5}, {"temperature": 1.3, "top_p": 0.8}, {"temperature": 0.9}]


class Engine:
    """Scheduler, loop and runner, put together."""

    def __init__(self, *, depth=1, blocks=200, budget=2048, width=0, drafter=None, slots=8):
        self.runner = make_runner(width=width, drafter=drafter, blocks=blocks, slots=slots)
        groups = self.runner.kv.groups
        allocation = Allocation((blocks,) * len(groups), slots, LONGEST, budget, width)
        config = EngineConfig(max_tokens_per_step=budget, max_requests=slots)
        self.scheduler = Scheduler(config, groups, allocation, Capabilities(), depth=depth)
        loop = PlainLoop if depth == 1 else OverlappedLoop
        self.loop = loop(self.scheduler, self.runner, self.emit, **({} if depth == 1 else {"depth": depth}))
        self.out: dict[str, list[int]] = {}
        self.finish: dict[str, str] = {}
        self.logprobs: dict[str, list] = {}
        self.prompt_logprobs: dict[str, list] = {}

    def emit(self, updates):
        for i, name in enumerate(updates.requests):
            self.out.setdefault(name, []).extend(updates.tokens[updates.offsets[i] : updates.offsets[i + 1]].tolist())
            self.finish[name] = FINISH_REASONS[updates.finish[i]]
        for found, kept in ((updates.logprobs, self.logprobs), (updates.prompt_logprobs, self.prompt_logprobs)):
            for i in range(len(found.row) if found else 0):
                kept.setdefault(updates.requests[found.row[i]], []).append((int(found.position[i]), int(found.token_ids[i, 0])))

    def add(self, name, prompt, key, sampling, new=NEW, **more):
        row = SamplingRow(num_prompt_tokens=len(prompt), **{"temperature": 0.0, **sampling})
        self.scheduler.add(Request(name, np.array(prompt, np.int32), row, key, len(prompt) + new, **more))
        return oracle(prompt, new, row, key)

    def run(self):
        while self.loop.step():
            pass
        self.scheduler.check()


def add_all(engine, **more):
    return {f"r{i}": engine.add(f"r{i}", p, 40 + i, s, **more) for i, (p, s) in enumerate(zip(PROMPTS, SAMPLINGS))}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("size", [{}, {"budget": 7}, {"blocks": 12}, {"blocks": 12, "budget": 7, "slots": 3}])
def test_every_request_gets_what_it_gets_alone(size, depth):
    engine = Engine(depth=depth, **size)
    truth = add_all(engine)
    engine.run()
    assert engine.out == truth
    assert engine.scheduler.preemptions > 0 or "blocks" not in size


class Following(ScriptedDrafter):
    """Scripted by prompt, as slots change hands."""

    def __init__(self, width, tree, truth):
        super().__init__(width, tree, truth)
        self.scripts = {}

    def opened(self, opened):
        known = opened.token_ids.tolist()
        self.future[opened.slot] = next(s for s in self.scripts if s[: len(known)] == known)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("size", [{}, {"blocks": 12}])
@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("truth", ["right", "half"])
def test_drafts_change_nothing_in_the_real_loop(truth, tree, size, depth):
    drafter = Following(4, tree, truth)
    engine = Engine(depth=depth, width=4, drafter=drafter, **size)
    expected = add_all(engine)
    drafter.scripts = [[*p, *expected[f"r{i}"]] for i, p in enumerate(PROMPTS)]
    engine.run()
    assert engine.out == expected
    assert engine.scheduler.preemptions > 0 or not size


@pytest.mark.parametrize("depth", [1, 2])
def test_families_fork_their_prompt(depth):
    engine = Engine(depth=depth, budget=9)
    truth = {f"c{j}": engine.add(f"c{j}", PROMPTS[2], 7 + j, {"temperature": 1.0}, family="f") for j in range(3)}
    engine.run()
    assert engine.out == truth and len({tuple(t) for t in truth.values()}) == 3


@pytest.mark.parametrize("depth", [1, 2])
def test_stop_tokens_end_a_row_in_the_middle_of_its_drafts(depth):
    drafter = Following(4, False, "right")
    engine = Engine(depth=depth, width=4, drafter=drafter)
    truth = oracle(PROMPTS[1], NEW, SamplingRow(temperature=1.0), key=41)
    drafter.scripts = [[*PROMPTS[1], *truth]]
    stop = truth[5]
    engine.add("r", PROMPTS[1], 41, {"temperature": 1.0, "logprobs": 1}, stop_ids=frozenset([stop]))
    engine.run()
    ended = truth[: truth.index(stop) + 1]
    assert engine.finish["r"] == "stop" and engine.out["r"][: len(ended) - 1] == ended[:-1]
    assert [token for _, token in engine.logprobs["r"]] == engine.out["r"]


@pytest.mark.parametrize("depth", [1, 2])
def test_prompt_logprobs_come_once_also_after_a_preemption(depth):
    engine = Engine(depth=depth, blocks=12, budget=7)
    truth = add_all(engine, flags=PROMPT_LOGPROBS)
    engine.run()
    assert engine.out == truth
    wanted = {f"r{i}": list(enumerate(p))[1:] for i, p in enumerate(PROMPTS)}
    assert {name: engine.prompt_logprobs.get(name, []) for name in wanted} == wanted
