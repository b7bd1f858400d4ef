"""The small arrays of a step, made by kernels, are those of the runner's own parts: the kernels interpreted."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
from steady_workload import REQUESTS
from step_twins import ENGINES, OTHERS, check, twins

QUICK = ("eagle",)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_device.py runs them on the GPU")


@pytest.mark.parametrize(
    "options", [pytest.param(ENGINES[name], id=name, marks=() if name in QUICK else pytest.mark.slow) for name in ENGINES]
)
def test_every_array_is_the_kernels(options, monkeypatch):
    from kernel_cpu.device import CpuDevice
    from kernel_cuda.steps import FusedAcceptance, FusedDrafting, FusedInputs

    seen, ordinary = Counter(), CpuDevice.runner_parts
    parts = twins(FusedInputs, FusedAcceptance, FusedDrafting, seen) | {"steady": lambda runner: None}
    monkeypatch.setattr(CpuDevice, "runner_parts", lambda device: ordinary(device) | parts)
    check(options, seen, (REQUESTS["random"], OTHERS["repeating"], OTHERS["prefixes"]))
