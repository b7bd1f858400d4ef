"""Decode steps on the host's own memory give what the runner's ordinary steps give."""

from functools import partial

import pytest
import torch
from kernel_cpu.device import CpuDevice
from kernel_cpu.steady import SteadySteps

from kernel_core import Engine, SamplingParams

greedy = partial(SamplingParams, temperature=0, max_tokens=9, ignore_eos=True)
random = partial(SamplingParams, temperature=1.1, seed=7, max_tokens=9, ignore_eos=True)
REQUESTS = {
    "greedy": [([1, 2, 3], greedy()), (list(range(40)), greedy()), ([9], greedy(max_tokens=30))],
    "random": [([1, 2, 3], random()), ([5] * 20, greedy()), ([9], random(seed=1, max_tokens=20))],
    "filtered": [([1, 2, 3], random(top_k=5)), ([5] * 20, random(top_p=0.7)), ([9], random(min_p=0.1, max_tokens=12))],
    "ordinary between": [([1, 2, 3], greedy(max_tokens=20)), ([4], greedy(logprobs=2, max_tokens=5))],
    "transformed between": [([1, 2, 3], greedy(max_tokens=20)), ([4], random(fields={"presence_penalty": 1.5}, max_tokens=7))],
    "to the last position": [([1, 2, 3], greedy(max_tokens=93)), (list(range(50)), random(max_tokens=46))],
}


@pytest.fixture
def answers(byte_model, monkeypatch):
    """Tokens of requests that are added while others run, and the rows of every step that was steady."""

    def run(requests, steady, **options):
        counted = []
        ordinary = CpuDevice.runner_parts
        with monkeypatch.context() as patch:
            parts = {"steady": partial(counting, counted)} if steady else {"steady": lambda runner: None}
            patch.setattr(CpuDevice, "runner_parts", lambda device: ordinary(device) | parts)
            keys = dict(dtype="float32", max_model_len=96, max_requests=5) | options
            with Engine(model=str(byte_model), device="cpu", **keys) as engine:
                return run_all(engine, requests), counted

    return run


def counting(counted, runner):
    steps = SteadySteps(runner)

    def step(plan):
        done = steps(plan)
        counted.extend([] if done is None else [len(plan.rows)])
        return done

    return step


def run_all(engine, requests):
    outputs, waiting = {}, list(enumerate(requests))
    for turn in range(400):
        if waiting and turn % 3 == 0:
            name, (prompt, params) = waiting.pop(0)
            engine.add_request(str(name), prompt, params)
        for output in engine.step():
            outputs[output.request_id] = [c.token_ids for c in output.outputs]
        if not waiting and not engine.has_unfinished_requests():
            return outputs
    raise AssertionError("the requests did not end")


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("options", [{}, {"overlap": True}, {"kv_blocks": 9}], ids=["plain", "overlapped", "preempting"])
def test_tokens_are_those_of_ordinary_steps(answers, requests, options):
    expected, none = answers(requests, steady=False, **options)
    got, counted = answers(requests, steady=True, **options)
    assert got == expected
    assert counted and not none


def test_a_sleeping_drafter_learns_of_such_steps_and_wakes():
    with Engine(model="tiny-chat", device="cpu", plugins={"eagle": {"head": "tiny-chat-eagle3"}}) as engine:
        runner = engine.core.executor._worker.runner
        counted, length = [], runner.drafter.length
        runner._steady = counting(counted, runner)
        graphs, tapped = runner.graphs, []
        runner.graphs = lambda fwd: tapped.append(fwd.tapped) or graphs(fwd)
        length._sleeping, length._debt = True, 1e-9
        engine.add_request("0", [5, 6, 7], greedy(max_tokens=4))
        while engine.has_unfinished_requests():
            engine.step()
        assert counted == [1] * len(counted) and len(counted) >= 1
        assert not length._sleeping and not tapped[1]


@pytest.mark.parametrize("steady", [True, False])
def test_weighing_a_step_changes_nothing(answers, byte_model, steady):
    requests = REQUESTS["random"]
    expected, _ = answers(requests, steady)
    with Engine(model=str(byte_model), device="cpu", dtype="float32", max_model_len=96, max_requests=5) as engine:
        runner = engine.core.executor._worker.runner
        runner._steady = runner._steady if steady else None
        submit = runner.submit
        runner.submit = lambda plan: [runner._weigh(rows) for rows in (1, 3)] and submit(plan)
        with torch.inference_mode():
            assert run_all(engine, requests) == expected
        padding = runner.slots.padding
        assert (int(runner.slots.known[padding]), int(runner.slots.computed[padding])) == (1, 0)
