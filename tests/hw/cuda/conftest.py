"""Kernels run on the GPU where there is one, else in Triton's interpreter, which must be chosen before they are imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device():
    """Where this session's kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session", autouse=True)
def one_core():
    """The CPU device's threads wait for one another by turning; where cores are shared that takes most of the time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernel_cpu.threads.available_cores", lambda: 1)
        yield
