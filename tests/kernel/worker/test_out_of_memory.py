"""A device without memory for a step: its requests are computed again in smaller steps, and nobody's tokens change."""

import logging

import pytest
import torch
from test_with_scheduler import PROMPTS, Engine, Following, add_all

from kernel_core import scheduler as scheduling
from kernel_core.plan import PROMPT_LOGPROBS

LONG = list(range(20, 36))


class Small:
    """The runner's "graphs" on a device with memory for `most` tokens a step; `poison`: one token that never fits."""

    def __init__(self, model, most: int, poison: int = -1):
        self.model, self.most, self.poison = model, most, poison
        self.sizes: list[int] = []  # of the steps that ran
        self.failed: list[int] = []

    def __call__(self, forward):
        size = len(forward.token_ids)
        if size > self.most or (forward.token_ids == self.poison).any():
            self.failed.append(size)
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        self.sizes.append(size)
        return self.model(forward)


def small(engine: Engine, most: int, poison: int = -1) -> Small:
    engine.runner.graphs = Small(engine.runner.model, most, poison)
    return engine.runner.graphs


def run(engine: Engine) -> None:
    steps = 0
    while engine.loop.step():
        steps += 1
        assert steps < 3000, "it never ends"
    engine.scheduler.check()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("size", [{}, {"budget": 12}, {"blocks": 12, "slots": 3}])
def test_smaller_steps_give_the_same_tokens(size, most, depth):
    engine = Engine(depth=depth, **size)
    device = small(engine, most)
    truth = add_all(engine)
    run(engine)
    assert engine.out == truth and set(engine.finish.values()) == {"length"}
    assert device.failed and max(device.sizes) <= most
    assert len(device.failed) <= 12, "it does not settle on a size"
    assert engine.scheduler.preemptions > 0
    assert not engine.runner._lost.any()


@pytest.mark.parametrize("depth", [1, 2])
def test_requests_that_come_later_and_leave_early(depth):
    engine = Engine(depth=depth)
    small(engine, 6)
    submit, left_out = engine.runner.submit, []

    def recorded(plan):
        pending = submit(plan)
        left_out.append(pending.whole is not None and 0 < len(pending.plan.rows) < len(plan.rows))
        return pending

    engine.runner.submit = recorded
    truth = {}
    for number in range(12):
        name, prompt = f"r{number}", PROMPTS[number % len(PROMPTS)]
        truth[name] = engine.add(name, prompt, 40 + number, {"temperature": 1.0})
        if number % 3 == 2:
            engine.scheduler.abort([f"r{number - 1}"])
        engine.loop.step()
    run(engine)
    for number in range(12):
        name = f"r{number}"
        if number % 3 == 1:
            assert engine.out.get(name, []) == truth[name][: len(engine.out.get(name, []))]
        else:
            assert engine.out[name] == truth[name]
    assert any(left_out) == (depth > 1), "no later plan had both lost rows and others"


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("tree", [False, True])
def test_drafts_get_shorter_with_the_steps(tree, depth):
    drafter = Following(4, tree, "half")
    engine = Engine(depth=depth, width=4, drafter=drafter)
    small(engine, 3)
    expected = add_all(engine)
    drafter.scripts = [[*p, *expected[f"r{i}"]] for i, p in enumerate(PROMPTS)]
    run(engine)
    assert engine.out == expected


@pytest.mark.parametrize("depth", [1, 2])
def test_families_and_logprobs(depth):
    engine = Engine(depth=depth, budget=40)
    small(engine, 6)
    truth = {f"c{j}": engine.add(f"c{j}", LONG, 7 + j, {"temperature": 1.0}, family="f") for j in range(3)}
    more = {"temperature": 1.0, "logprobs": 1, "prompt_logprobs": 0}
    truth["p"] = engine.add("p", PROMPTS[4], 3, more, flags=PROMPT_LOGPROBS)
    run(engine)
    assert engine.out == truth
    assert engine.logprobs["p"] == list(enumerate(truth["p"], len(PROMPTS[4])))
    assert engine.prompt_logprobs["p"] == list(enumerate(PROMPTS[4]))[1:]


@pytest.mark.parametrize("depth", [1, 2])
def test_only_the_request_that_never_fits_ends(depth):
    engine = Engine(depth=depth)
    small(engine, 100, poison=9)
    reasons = {}
    engine.loop.outlet._emit = lambda updates: (reasons.update(updates.errors), engine.emit(updates))
    truth = {name: engine.add(name, prompt, 5, {}) for name, prompt in {"a": [3, 1, 4], "b": [9], "c": [7, 7]}.items()}
    run(engine)
    assert engine.finish["b"] == "error" and not engine.out["b"]
    assert list(reasons) == ["b"] and "lower engine.memory_fraction" in reasons["b"]
    assert {name: engine.out[name] for name in "ac"} == {name: truth[name] for name in "ac"}


def test_it_is_said_and_grows_again(caplog, monkeypatch):
    monkeypatch.setattr(scheduling, "GROW_EVERY", 8)
    engine = Engine()
    device = small(engine, 8)
    with caplog.at_level(logging.WARNING, "kernel_core"):
        truth = add_all(engine)
        run(engine)
    assert engine.out == truth
    assert "6 tokens a step at most" in caplog.text and "engine.memory_fraction" in caplog.text
    device.most = 1000
    for number in range(100):
        truth = engine.add(f"again{number}", PROMPTS[0], number, {})
        run(engine)
        assert engine.out[f"again{number}"] == truth
    assert engine.scheduler.selector.budget == engine.scheduler.selector.most == 2048
