"""The small arrays of a step, made with numpy, are those of the kernel's own parts, in every step of real workloads."""

from collections import Counter

import pytest
from kernel_cpu.device import CpuDevice
from kernel_cpu.steps import HostAcceptance, HostDrafting, HostInputs
from steady_workload import REQUESTS
from step_twins import ENGINES, OTHERS, check, twins


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_every_array_is_the_kernels(options, monkeypatch):
    seen, ordinary = Counter(), CpuDevice.runner_parts
    parts = twins(HostInputs, HostAcceptance, HostDrafting, seen) | {"steady": lambda runner: None}
    monkeypatch.setattr(CpuDevice, "runner_parts", lambda device: ordinary(device) | parts)
    check(options, seen, (REQUESTS | OTHERS).values())
