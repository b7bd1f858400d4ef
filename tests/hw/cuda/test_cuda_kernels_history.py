"""What is read from the requests' own tokens is what the plugins' references read."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
from kernel_cuda.kernels import history
from kernel_cuda.ops import Penalise as FusedPenalise
from kernel_ngram.lookup import look_up_slots
from kernel_penalties.penalise import Penalise

GPU = torch.cuda.is_available()
VOCAB, SLOTS, LENGTH, WIDTH = 13, 5, 60, 3


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    if not GPU:
        monkeypatch.setattr(history, "BLOCK", 16)


def step_of(draw, rows, device):
    """Requests of all lengths, with drafts of which some are before a logits row and some are not there."""
    known = torch.tensor([1, 17, 40, 58, 33], dtype=torch.int32)
    tokens = torch.randint(0, VOCAB, (SLOTS, LENGTH + 1), generator=draw).int()
    ancestors = torch.randint(-1, WIDTH, (rows, WIDTH), generator=draw).sort(1).values.int()
    ancestors[:, 1:][ancestors[:, 1:] == ancestors[:, :-1]] = -1
    some = SimpleNamespace(
        slot=torch.randint(0, SLOTS, (rows,), generator=draw),
        row=torch.randint(0, 4, (rows,), generator=draw),
        history=tokens,
        known=known,
        num_prompt=torch.tensor([1, 9, 40, 5, 20]).int(),
        ancestors=ancestors,
        drafts=torch.randint(-1, VOCAB, (4, WIDTH), generator=draw),
    )
    on = SimpleNamespace(**{name: tensor.to(device) for name, tensor in vars(some).items()})
    on.max_len = 58
    return on


@torch.inference_mode()
def test_penalties_are_those_of_the_reference_bit_for_bit(device, monkeypatch):
    draw = torch.Generator().manual_seed(0)
    reference, fused = Penalise(), FusedPenalise()
    for counters in (1 << 22, 3 * VOCAB):  # all rows at once, and in parts
        monkeypatch.setattr("kernel_cuda.ops.COUNTS_AT_ONCE", counters)
        for _ in range(6):
            step = step_of(draw, 9, device)
            numbers = (torch.rand(SLOTS, 3, generator=draw) * 2 + 0.1).to(device)
            logits = (torch.randn(9, VOCAB, generator=draw) * 4).to(device)
            logits[3, 2] = -torch.inf
            index = torch.tensor([0, 2, 3, 5, 8], device=device)
            expected = reference(logits.clone(), index, step, numbers)
            got = fused(logits.clone(), index, step, numbers)
            assert torch.equal(got, expected)
            assert torch.equal(got[[1, 4, 6, 7]], logits[[1, 4, 6, 7]])


@pytest.mark.parametrize(("least", "most", "number"), [(1, 1, 1), (2, 4, 4), (3, 9, 7)])
@torch.inference_mode()
def test_drafts_are_those_of_the_reference(device, least, most, number):
    draw = torch.Generator().manual_seed(least)
    found = 0
    for alphabet in (2, 3, 6):
        tokens = torch.randint(0, alphabet, (8, LENGTH), generator=draw).int().to(device)
        slots = torch.randperm(8, generator=draw)[:6].to(device)
        known = torch.tensor([1, 2, 17, 33, 49, 60], device=device)
        given = tokens, slots, known, LENGTH, least, most, number
        expected, got = look_up_slots(*given), history.look_up(*given)
        assert got.tolist() == expected.tolist()
        found += int((expected >= 0).any(1).sum())
    assert 6 < found < 18
