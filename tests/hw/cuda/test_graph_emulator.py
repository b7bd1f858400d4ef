"""The emulated graph does what a captured one does, and refuses what a capture refuses."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from graph_emulator import Emulator, Refused

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there are real graphs")


def test_a_replay_reads_new_tensors_and_old_numbers():
    x, number, counter = torch.arange(4.0), [2.0], torch.zeros(2)

    def function():
        counter.add_(1)
        y = x.view(2, 2) * number[0]
        y[0] += 1
        return y.sum(1), torch.empty(3).fill_(number[0])

    replay, (total, filled) = Emulator()(function)
    assert total.isnan().all() and counter.tolist() == [1, 1]  # recording changes nothing and gives nothing
    number[0] = 100.0
    x.copy_(torch.tensor([1.0, 1.0, 3.0, 3.0]))
    replay()
    assert total.tolist() == [6.0, 12.0] and filled.tolist() == [2.0] * 3 and counter.tolist() == [2, 2]
    x.zero_()
    replay()
    assert total.tolist() == [2.0, 0.0] and counter.tolist() == [3, 3]


def test_kernels_are_launched_again_on_the_same_tensors():
    from kernel_cuda.kernels.pointwise import rms_norm

    x, weight = torch.ones(2, 8), torch.ones(8)
    replay, (normal, _) = Emulator()(lambda: rms_norm(x * 3, weight, 0.0))
    weight.copy_(torch.arange(8.0))
    assert normal.isnan().all()
    replay()
    assert torch.allclose(normal, torch.arange(8.0).expand(2, 8))


READS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: 1 if x.sum() > 0 else 0,
    "cpu": lambda x: x.cpu(),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 1],
    "write by a mask": lambda x: x.__setitem__(x > 1, 0.0),
    "repeat": lambda x: torch.ones(4).repeat_interleave(x.long()),
    "unique": lambda x: x.unique(),
    "a list to the device": lambda x: x + torch.tensor([1.0]),
    "pageable memory": lambda x: x + torch.from_numpy(np.ones(4, np.float32)),
}


@pytest.mark.parametrize("function", READS.values(), ids=READS)
def test_what_a_capture_refuses_is_refused(function):
    x = torch.arange(4.0)
    with torch.inference_mode(), pytest.raises(Refused):
        Emulator()(lambda: function(x))
