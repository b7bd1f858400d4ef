"""What kernels read from the requests' own tokens is what the plugins' references read."""

import pytest
import torch
from history_cases import NGRAMS, check_bans, check_look_up, check_penalties
from kernel_cpu import build, history

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no compiler")


def test_penalties():
    check_penalties(history.penalise, CPU)


@pytest.mark.parametrize("length", [0, 1, 4])
def test_bans(length):
    check_bans(history.ban, CPU, length)


@pytest.mark.parametrize(("least", "most", "number"), NGRAMS)
def test_drafts(least, most, number):
    check_look_up(history.look_up, CPU, least, most, number)
