"""What kernels read from the requests' own tokens is what the plugins' references read."""

import pytest
import torch

pytest.importorskip("triton")
from history_cases import NGRAMS, VOCAB, check_bans, check_look_up, check_penalties
from kernel_cuda.kernels import history
from kernel_cuda.ops import Penalise


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(history, "BLOCK", 16)


@pytest.mark.parametrize("counters", [1 << 22, 3 * VOCAB], ids=["all rows at once", "in parts"])
def test_penalties(device, monkeypatch, counters):
    monkeypatch.setattr("kernel_cuda.ops.COUNTS_AT_ONCE", counters)
    check_penalties(Penalise(), device)


@pytest.mark.parametrize("length", [0, 1, 4])
def test_bans(device, length):
    check_bans(history.ban, device, length)


@pytest.mark.parametrize(("least", "most", "number"), NGRAMS)
def test_drafts(device, least, most, number):
    check_look_up(history.look_up, device, least, most, number)
