"""Whole decode steps as graphs give what the runner's ordinary steps give: the kernels interpreted, the graphs emulated."""

import pytest
import torch

from kernel_core import Engine

pytest.importorskip("triton")
import emulated_device
from graph_emulator import Emulator
from steady_workload import REQUESTS, counting, greedy, run_all

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_device.py runs real graphs")

QUICK = dict(dtype="float32", max_model_len=96, max_requests=5)


@pytest.fixture
def answers(byte_model, monkeypatch):
    """Tokens of requests that are added while others run, and the rows of every step that was steady."""

    def run(requests, steady, **options):
        from kernel_cpu.device import CpuDevice
        from kernel_cuda.steady import SteadySteps

        counted = []
        steady_steps = lambda runner: counting(SteadySteps(runner, most_rows=8, record=Emulator()), counted)  # noqa: E731
        if steady:
            emulated_device.use(monkeypatch)
            monkeypatch.setattr(CpuDevice, "runner_parts", lambda device: {"steady": steady_steps})
        with Engine(model=str(byte_model), device="cpu", **QUICK, **options) as engine:
            return run_all(engine, requests), counted

    yield run


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


@pytest.mark.parametrize(("fails", "captures", "runs"), [({0, 1}, 2, False), ({1}, 2, False), ({0}, 4, True), ({2}, 3, True)])
def test_without_memory_for_a_graph_steps_run_as_they_are(byte_model, monkeypatch, caplog, fails, captures, runs):
    """The first graph is one of the most rows, or if that does not fit of fewer; after the next that does not, none is tried."""
    from kernel_cpu.device import CpuDevice
    from kernel_cuda.steady import SteadySteps

    asked, counted, record = [], [], Emulator()

    def full(step):
        asked.append(step)
        if len(asked) - 1 in fails:
            raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
        return record(step)

    with Engine(model=str(byte_model), device="cpu", **QUICK) as engine:
        expected = run_all(engine, REQUESTS["greedy"])
    emulated_device.use(monkeypatch)
    made = lambda runner: counting(SteadySteps(runner, most_rows=8, record=full), counted)  # noqa: E731
    monkeypatch.setattr(CpuDevice, "runner_parts", lambda device: {"steady": made})
    with Engine(model=str(byte_model), device="cpu", **QUICK) as engine:
        assert run_all(engine, REQUESTS["greedy"]) == expected
    assert (len(asked), bool(counted)) == (captures, runs)
    assert "no memory for more graphs of decode steps" in caplog.text


def test_while_a_drafter_sleeps_steps_are_steady(monkeypatch):
    """The answers are those without it, and the graphs keep no states for it."""
    requests = [([1, 2, 3], greedy(max_tokens=12)), ([9], greedy(max_tokens=6))]
    options = dict(model="tiny-chat", device="cpu") | QUICK
    with Engine(**options) as engine:
        expected = run_all(engine, requests)
    emulated_device.use(monkeypatch, steady=True)
    with Engine(**options, plugins={"eagle": {"head": "tiny-chat-eagle3"}}) as engine:
        runner = engine.core.executor._worker.runner
        counted, model, tapped = [], runner.model, []
        runner._steady = counting(runner._steady, counted)
        model.register_forward_pre_hook(lambda module, given: tapped.append(given[0].tapped))
        runner.drafter.length._sleeping, runner.drafter.length._debt = True, 1e9
        assert run_all(engine, requests) == expected
    assert sum(counted) > 10 and not any(tapped)


def test_sizes_cover_every_number_of_rows():
    from kernel_cuda.capture import sizes_up_to

    for most in (1, 3, 16, 100, 128, 129, 300, 512):
        sizes = sizes_up_to(most)
        assert sizes == sorted(set(sizes)) and sizes[-1] == most
        assert all(next(s for s in sizes if s >= rows) <= max(2 * rows, rows + 32) for rows in range(1, most + 1))
