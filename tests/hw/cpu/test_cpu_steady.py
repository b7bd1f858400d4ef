"""Decode steps on the host's own memory give what the runner's ordinary steps give."""

import pytest
import torch
from kernel_cpu.device import CpuDevice
from kernel_cpu.steady import SteadySteps
from steady_workload import REQUESTS as COMMON
from steady_workload import counting, greedy, random, run_all

from kernel_core import Engine

REQUESTS = COMMON | {
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
            parts = (
                {"steady": lambda runner: counting(SteadySteps(runner), counted)} if steady else {"steady": lambda runner: None}
            )
            patch.setattr(CpuDevice, "runner_parts", lambda device: ordinary(device) | parts)
            keys = dict(dtype="float32", max_model_len=96, max_requests=5) | options
            with Engine(model=str(byte_model), device="cpu", **keys) as engine:
                return run_all(engine, requests), counted

    return run


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
        runner._steady = counting(SteadySteps(runner), counted)
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
