"""The worker from a resolved plan to steps, and the executor that runs it in this process."""

import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import worker_device
from test_speculation import ScriptedDrafter
from toy_worker import Driver, ToyModel, V, oracle

from kernel_core.config import KernelConfig
from kernel_core.contexts import ModelInfo
from kernel_core.errors import CapacityError, ConfigError, EngineDeadError, PluginError
from kernel_core.executor import InProcessExecutor
from kernel_core.nn.worker import Worker, choose_dtype
from kernel_core.plan import Allocation, Capabilities, SamplingRow
from kernel_core.protocols import Executor, Handle
from kernel_core.resolver import PluginEntry, ResolvedPlan, _version
from kernel_core.wire import decode

INFO = ModelInfo("", "toy", {"architectures": ["Toy"], "vocab_size": V, "max_position_embeddings": 64})
ALLOCATION = Allocation((50, 50), 8, 64, 100)


@pytest.fixture(autouse=True)
def toy_model(monkeypatch):
    """The toy is no family of a checkpoint, so it takes the place of loading one."""
    loading = types.ModuleType("kernel_core.nn.loading")
    loading.build_model = lambda family, context, registry: ToyModel()
    monkeypatch.setitem(sys.modules, "kernel_core.nn.loading", loading)
    monkeypatch.setattr("kernel_core.nn.worker.find_family", lambda architecture: architecture)
    worker_device.made.clear()


def plan_of(**engine) -> ResolvedPlan:
    version = _version("kernel-core")
    device = PluginEntry("toy", "device", "worker_device", "kernel-core", version, "test")
    return ResolvedPlan(KernelConfig(engine=engine), (), device, None, (), version)


def drive(submit, groups) -> list[int]:
    """Greedy tokens of a short request through anything with the runner's `submit`."""
    runner = types.SimpleNamespace(submit=submit, kv=types.SimpleNamespace(groups=groups))
    driver = Driver(runner)
    driver.add([3, 1, 4], 6)
    return driver.run()[0]


def without_zero(logits, prompt, output):
    logits[0] = -np.inf
    return logits


def test_a_worker_starts_reports_and_runs():
    worker = Worker(plan_of(memory_fraction=0.5), INFO, rank=1, world_size=2)
    report = worker.start()
    assert [(g.kind, g.window, g.layers) for g in report.groups] == [("full", None, ("layers.0",)), ("window", 5, ("layers.1",))]
    assert {(g.block_size, g.bytes_per_block) for g in report.groups} == {(4, 4 * 2 * 16 * 4)}
    assert (report.vocab_size, report.max_model_len, report.draft_width) == (V, 64, 0)
    assert report.memory["weights"] == sum(p.nbytes for p in ToyModel().parameters())
    assert report.kv_budget_bytes == report.memory["kv"] == 2**28 - report.memory["activations"]
    assert report.timings["model"] > 0
    with pytest.raises(CapacityError, match="allocate"):
        worker.submit(None)
    worker.allocate(ALLOCATION)
    context = worker_device.made["context"]
    assert (context.max_slots, context.max_model_len, context.vocab_size, context.dtype) == (8, 64, V, torch.float32)
    assert (context.rank, context.world_size) == (1, 2) and worker_device.made["rank"] == (1, 2, "worker")
    assert drive(worker.submit, report.groups) == oracle([3, 1, 4], 6, SamplingRow(0.0), change=without_zero)
    worker.close()
    worker.close()
    assert worker_device.made["device"].closed == 1


def test_calls_are_reached_by_plugin_and_name():
    worker = Worker(plan_of(), INFO)
    worker.start()
    assert worker.call("toy.echo", b"hi") == b"hi!"
    explained = decode(worker.call("kernel.explain", b""), dict)
    assert explained["attention"] == {"layers.0": "torch:reference", "layers.1": "torch:reference"}
    with pytest.raises(PluginError, match=r"toy\.nothing.*toy\.echo"):
        worker.call("toy.nothing", b"")


@pytest.mark.parametrize(
    ("engine", "error", "words"),
    [
        ({"block_size": 16}, ConfigError, r"block_size = 16.*\[4, 8\]"),
        ({"dtype": "bfloat16"}, ConfigError, "bfloat16.*float32"),
        ({"max_tokens_per_step": 10**9}, CapacityError, "max_tokens_per_step"),
    ],
)
def test_what_cannot_work_is_refused_at_start(engine, error, words):
    with pytest.raises(error, match=words):
        Worker(plan_of(**engine), INFO).start()


def test_a_drafter_is_reported_and_trees_need_a_device_that_has_them():
    worker_device.made["drafter"] = ScriptedDrafter(3, False, "right")
    assert Worker(plan_of(), INFO).start().draft_width == 3
    worker_device.made["drafter"] = ScriptedDrafter(3, True, "right")
    with pytest.raises(ConfigError, match="tree"):
        Worker(plan_of(), INFO).start()


@pytest.mark.parametrize(
    ("stated", "has", "dtype"),
    [
        ("bfloat16", ("float32", "bfloat16"), torch.bfloat16),
        ("float16", ("float32", "bfloat16"), torch.bfloat16),
        ("float16", ("float32",), torch.float32),
        ("float32", ("bfloat16", "float32"), torch.float32),
        ("torch.float16", ("float16",), torch.float16),
        (None, ("float32", "bfloat16"), torch.float32),
    ],
)
def test_auto_dtype_is_the_checkpoints_or_the_nearest(stated, has, dtype):
    for config in ({"dtype": stated}, {"torch_dtype": stated}, {"text_config": {"dtype": stated}}):
        assert choose_dtype("auto", config, Capabilities(dtypes=has)) is dtype


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_executor_runs_the_worker(asynchronous):
    worker_device.made["async"] = asynchronous
    executor = InProcessExecutor(plan_of(), INFO)
    assert isinstance(executor, Executor)
    report = executor.start()
    executor.allocate(ALLOCATION)
    handles = []

    def submit(plan):
        handles.append(executor.submit(plan))
        assert isinstance(handles[-1], Handle)
        return handles[-1]

    assert drive(submit, report.groups) == oracle([3, 1, 4], 6, SamplingRow(0.0), change=without_zero)
    assert handles[0].result() is handles[0].result()
    assert executor.call("toy.echo", b"a") == [b"a!"]
    executor.close()
    executor.close()
    with pytest.raises(EngineDeadError, match="closed"):
        executor.submit(None)


def test_an_error_inside_a_step_is_the_engines_death_with_its_cause():
    executor = InProcessExecutor(plan_of(), INFO)
    report = executor.start()
    executor.allocate(ALLOCATION)
    worker_device.made["transform"].broken = True
    with pytest.raises(EngineDeadError, match="told to break") as caught:
        drive(executor.submit, report.groups)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_step_that_has_no_memory_to_begin_with_says_what_to_lower(monkeypatch):
    executor = InProcessExecutor(plan_of(), INFO)
    report = executor.start()
    executor.allocate(ALLOCATION)

    def full(new_blocks):
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    monkeypatch.setattr(executor._worker.runner.tables, "update", full)
    with pytest.raises(EngineDeadError, match=r"\d rows and \d+ tokens .*2\.00 GiB.*lower engine\.memory_fraction"):
        drive(executor.submit, report.groups)


def test_the_executors_module_imports_no_torch():
    code = "import sys, kernel_core.executor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
