"""The small arrays of a step, made by kernels, are those of the runner's own parts: the kernels interpreted."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
from steady_workload import REQUESTS, greedy
from step_twins import ENGINES, OTHERS, check, twins

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_device.py runs them on the GPU")
QUESTION = [("<|user|>What does os.path.join do?<|end|><|assistant|>", greedy(max_tokens=40))]
WORKLOADS = REQUESTS["random"], OTHERS["repeating"], OTHERS["prefixes"]


def test_every_array_of_a_few_steps(monkeypatch):
    compare(ENGINES["eagle"], [QUESTION, OTHERS["prefixes"][:2]], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_every_array_is_the_kernels(options, monkeypatch):
    compare(options, WORKLOADS, monkeypatch)


def compare(options, workloads, monkeypatch):
    from kernel_cpu.device import CpuDevice
    from kernel_cuda.steps import FusedAcceptance, FusedDrafting, FusedInputs

    seen, ordinary = Counter(), CpuDevice.runner_parts
    parts = twins(FusedInputs, FusedAcceptance, FusedDrafting, seen) | {"steady": lambda runner: None}
    monkeypatch.setattr(CpuDevice, "runner_parts", lambda device: ordinary(device) | parts)
    check(options, seen, workloads)
