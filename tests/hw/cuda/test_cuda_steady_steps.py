"""Whole decode steps as graphs give what the runner's ordinary steps give: the kernels interpreted, the graphs emulated."""

from functools import partial

import pytest
import torch

from kernel_core import Engine, SamplingParams

pytest.importorskip("triton")
import emulated_device
from graph_emulator import Emulator

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_device.py runs real graphs")

QUICK = dict(dtype="float32", max_model_len=96, max_requests=5)


@pytest.fixture
def answers(byte_model, monkeypatch):
    """Tokens of requests that are added while others run, and the rows of every step that was steady."""

    def run(requests, steady, **options):
        from kernel_cpu.device import CpuDevice

        counted = []
        if steady:
            emulated_device.use(monkeypatch)
            monkeypatch.setattr(CpuDevice, "runner_parts", lambda device: {"steady": partial(counting, counted)})
        with Engine(model=str(byte_model), device="cpu", **QUICK, **options) as engine:
            return run_all(engine, requests), counted

    yield run


def counting(counted, runner):
    from kernel_cuda.steady import SteadySteps

    steps = SteadySteps(runner, most_rows=8, record=Emulator())

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


greedy = partial(SamplingParams, temperature=0, max_tokens=9, ignore_eos=True)
random = partial(SamplingParams, temperature=1.1, seed=7, max_tokens=9, ignore_eos=True)
REQUESTS = {
    "greedy": [([1, 2, 3], greedy()), (list(range(40)), greedy()), ([9], greedy(max_tokens=30))],
    "random": [([1, 2, 3], random()), ([5] * 20, greedy()), ([9], random(seed=1, max_tokens=20))],
    "filtered": [([1, 2, 3], random(top_k=5)), ([5] * 20, random(top_p=0.7)), ([9], random(min_p=0.1, max_tokens=12))],
    "ordinary between": [([1, 2, 3], greedy(max_tokens=20)), ([4], greedy(logprobs=2, max_tokens=5))],
}


@pytest.mark.parametrize("requests", REQUESTS.values(), ids=REQUESTS)
def test_tokens_are_those_of_ordinary_steps(answers, requests):
    expected, _ = answers(requests, steady=False)
    got, counted = answers(requests, steady=True)
    assert got == expected
    assert sum(counted) > 10


def test_window_groups_and_small_pools(answers):
    requests = [(list(range(i, i + 20)), greedy(max_tokens=20)) for i in range(4)]
    expected, _ = answers(requests, steady=False)
    got, counted = answers(requests, steady=True, kv_blocks=8)
    assert got == expected
    assert counted


def test_sizes_cover_every_number_of_rows():
    from kernel_cuda.capture import sizes_up_to

    for most in (1, 3, 16, 100, 128, 129, 300, 512):
        sizes = sizes_up_to(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert all(next(s for s in sizes if s >= rows) <= max(2 * rows, rows + 32) for rows in range(1, most + 1))
