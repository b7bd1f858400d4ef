"""What a step takes is measured before KV is made, and KV gets the rest. Without a GPU the CPU device is made to measure."""

import gc

import numpy as np
import pytest
import torch
from kernel_cuda import trial

from kernel_core import Engine, SamplingParams
from kernel_core.errors import CapacityError
from kernel_core.plan import Allocation

MIB = 1 << 20


@pytest.fixture
def measuring(monkeypatch):
    """The CPU device with `peak_memory` as the argument says."""
    from kernel_cpu.device import CpuDevice

    from kernel_core.nn.api import MemoryReport

    def use(peak_memory):
        monkeypatch.setattr(CpuDevice, "peak_memory", peak_memory, raising=False)
        monkeypatch.setattr(CpuDevice, "memory", lambda device: MemoryReport(total=400 * MIB, free=200 * MIB))

    return use


def started(model, **options):
    return Engine(model=str(model), device="cpu", dtype="float32", max_model_len=96, memory_fraction=0.5, **options)


def test_kv_gets_what_the_measured_step_leaves(byte_model, measuring):
    seen = []

    def peak_memory(device, make_runner, sizes):
        runner = make_runner()
        plan = trial.largest_step(sizes, sizes.max_tokens_per_step, runner.vocab_size)
        host = runner.submit(plan).wait()
        seen.append((sizes, plan, host["numbers"], host["logprobs.values"].shape, host["bad"].any()))
        trial.run(make_runner, sizes, 3)
        return 60 * MIB

    measuring(peak_memory)
    with started(byte_model, max_tokens_per_step=64, max_requests=10) as engine:
        memory = engine.core.report.memory
        assert memory["activations"] == 60 * MIB and memory["kv"] == 40 * MIB
        engine.add_request("0", [1, 2, 3], SamplingParams(temperature=0, max_tokens=4, detokenize=False))
        while engine.has_unfinished_requests():
            outputs = engine.step()
        assert len(outputs[0].outputs[0].token_ids) == 4
    ((sizes, plan, numbers, logprobs, bad),) = seen
    assert (sizes.max_slots, sizes.max_tokens_per_step, sizes.num_blocks) == (10, 64, (2,))
    assert plan.q.tolist() == [55] + [1] * 9 and logprobs == (10, 21) and not bad
    assert numbers[0].tolist() == [1] * 10 and (numbers[3] == plan.start + plan.q).all()


def test_nothing_is_measured_when_the_user_sets_the_size(byte_model, measuring):
    def peak_memory(device, make_runner, sizes):
        raise AssertionError("asked")

    measuring(peak_memory)
    for options in ({"kv_memory": "1MiB"}, {"kv_blocks": 20}):
        started(byte_model, **options).close()


def test_no_room_is_said_with_the_figures(byte_model, measuring):
    measuring(lambda device, make_runner, sizes: 300 * MIB)
    with pytest.raises(CapacityError, match=r"0\.29 GiB are kept for the largest step; lower engine\.max_tokens_per_step"):
        started(byte_model)


@pytest.mark.parametrize("where", ["step", "slots"])
def test_a_step_that_does_not_fit_stops_the_start(byte_model, measuring, monkeypatch, where):
    def fails(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    broken = "kernel_core.nn.runner.Runner._forward_arguments" if where == "step" else "kernel_core.nn.runner.SlotTable"
    measuring(lambda device, make_runner, sizes: trial.run(make_runner, sizes, 32))
    monkeypatch.setattr(broken, fails)
    with pytest.raises(CapacityError, match=r"a step of 32 tokens and .* requests does not fit beside the weights; lower"):
        started(byte_model, max_requests=4)


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize(("slots", "length", "tokens"), [(4, 96, 64), (4, 96, 3), (300, 32, 64), (2, 5000, 2048), (3, 8, 512)])
def test_the_largest_step_keeps_to_the_sizes(width, slots, length, tokens):
    sizes = Allocation((2,), slots, length, tokens, width)
    plan = trial.largest_step(sizes, tokens, 50)
    rows = len(plan.rows)
    assert 1 <= rows <= slots and plan.q.sum() <= tokens and (plan.q >= plan.room).all()
    assert plan.q.sum() == min(tokens, rows * length) or plan.q.sum() + (1 + width) > tokens
    assert (plan.start + plan.q <= length).all()
    for item, start, q, room in zip(plan.opened, plan.start, plan.q, plan.room, strict=True):
        assert item.computed == start and len(item.token_ids) - start == q - (room - 1)
    assert np.array_equal([item.slot for item in plan.opened], plan.rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_full_engine_stays_within_what_was_measured():
    options = dict(
        model="tiny-chat", device="cuda", dtype="bfloat16", max_requests=64, max_tokens_per_step=512, max_model_len=256
    )
    with Engine(**options, memory_fraction=0.3) as engine:
        memory = engine.core.report.memory
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        for number in range(64):
            asked = SamplingParams(temperature=1, top_p=0.9, logprobs=20, max_tokens=20, ignore_eos=True, detokenize=False)
            engine.add_request(str(number), list(range(2, 100)), asked)
        while engine.has_unfinished_requests():
            engine.step()
        assert torch.cuda.max_memory_reserved() - before <= memory["activations"]
