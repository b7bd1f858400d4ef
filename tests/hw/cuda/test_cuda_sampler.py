"""The device's sampler gives what the kernel's own gives, for batches of every kind."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from kernel_cuda.kernels import sampling
from kernel_cuda.sampling import FusedSampler

from kernel_core.nn.api import Sampler
from kernel_core.nn.slots import SlotTable

GPU, VOCAB, SLOTS = torch.cuda.is_available(), 700, 9
FILTERS = {"min_p": (0.0, 0.02, 0.3), "top_k": (0, 1, 30), "top_p": (1.0, 0.9, 0.4)}
#: what is drawn from for the slots of a batch
KINDS = {
    "greedy": {"temperature": (0.0,)} | FILTERS,
    "random": {"temperature": (0.0, 0.7, 1.0, 2.0)},
    "filtered": {"temperature": (0.0, 0.7, 1.0, 2.0)} | FILTERS,
}


def slots_of(kind, device, draw):
    slots = SlotTable(SLOTS, 8, 0, device)
    slots.host["logprobs"][:] = draw.integers(-1, 3, SLOTS + 1)
    slots.host["top_p"][:], slots.top_p[:] = 1.0, 1.0
    for name, values in KINDS[kind].items():
        slots.host[name][:] = draw.choice(values, SLOTS + 1)
        getattr(slots, name).copy_(torch.from_numpy(slots.host[name]))
    slots.key.copy_(torch.from_numpy(draw.integers(-(2**31), 2**31, (SLOTS + 1, 2))))
    return slots


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_logprobs_are_those_of_the_kernels_sampler(device, monkeypatch, kind, mode):
    if not GPU:
        monkeypatch.setattr(sampling, "PART", 512)
        monkeypatch.setattr(sampling, "ROOM", 1024)
    draw = np.random.default_rng(5)
    slots = slots_of(kind, device, draw)
    rows = draw.integers(0, SLOTS, 14)  # several logits rows of a slot, as when drafts are verified
    logits = torch.from_numpy(draw.normal(0, 3, (14, VOCAB))).float().to(device)
    logits[2, :600] = -torch.inf
    logits[5, 9], logits[11] = torch.nan, -torch.inf
    on = torch.from_numpy(rows).to(device)
    view = SimpleNamespace(slot=on, position=torch.arange(14, device=device) * 31)
    layout = SimpleNamespace(logits_slot=rows, logits_row=np.arange(14))
    expected, got = (
        sampler(slots, VOCAB, mode)(logits.clone(), view, layout, lambda logits, view: logits * 1.5)
        for sampler in (Sampler, partial(FusedSampler, ranks=True))
    )
    usable = ~expected.bad
    assert got.bad.tolist() == expected.bad.tolist() == [n in (5, 11) for n in range(14)]
    assert got.draws[usable].tolist() == expected.draws[usable].tolist()
    asked = torch.from_numpy(expected.logprobs.where).to(device)
    told = usable[asked]
    for name in ("token_ids", "rank"):
        assert torch.equal(getattr(got.logprobs, name)[told], getattr(expected.logprobs, name)[told]), name
    torch.testing.assert_close(got.logprobs.values[told], expected.logprobs.values[told], atol=1e-5, rtol=1e-5)
