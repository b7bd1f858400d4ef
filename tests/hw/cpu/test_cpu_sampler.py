"""The device's sampler draws the tokens that the kernel's own draws, and tells the same logprobs."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cpu.sampling import HostSampler, mask_bits

from kernel_core.nn import transforms
from kernel_core.nn.sampler import Sampler
from kernel_core.nn.slots import SlotTable

ROWS = 6
NUMBER = partial(st.floats, width=32)  # as slots keep them


def slots_with(numbers):
    """A slot table of `ROWS` requests, `numbers`: their temperature, top_p, min_p, top_k and logprobs."""
    slots = SlotTable(ROWS, 16, 0, torch.device("cpu"))
    make = torch.Generator().manual_seed(5)
    slots.key[:ROWS] = torch.randint(-(2**31), 2**31, (ROWS, 2), generator=make).int()
    for row, given_ in enumerate(numbers):
        for name, value in zip(("temperature", "top_p", "min_p", "top_k", "logprobs"), given_, strict=True):
            slots.host[name][row] = value
            if name != "logprobs":
                getattr(slots, name)[row] = value
    return slots


def both(logits, numbers, mode="raw_logprobs", seed=0):
    """What the kernel's sampler and the device's give for these logits [ROWS, V]."""
    slots, rows = slots_with(numbers), np.arange(ROWS)
    view = SimpleNamespace(slot=torch.arange(ROWS), position=torch.arange(ROWS) + 1000 * seed)
    layout = SimpleNamespace(logits_slot=rows, logits_row=rows)
    with torch.inference_mode():
        return [kind(slots, logits.shape[1], mode)(logits.clone(), view, layout, None) for kind in (Sampler, HostSampler)]


def logits_of(width, spread, seed, dtype=torch.float32):
    return (torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


NUMBERS = {
    "temperatures": [(t, 1.0, 0.0, 0, -1) for t in (0.0, 0.3, 0.7, 1.0, 1.5, 30.0)],
    "top_k": [(1.0, 1.0, 0.0, k, -1) for k in (1, 2, 20, 100, 1000, 5000)],
    "top_p": [(0.9, p, 0.0, 0, -1) for p in (1e-6, 0.1, 0.5, 0.9, 0.99, 0.99999)],
    "min_p": [(1.3, 1.0, p, 0, -1) for p in (0.0, 1e-4, 0.01, 0.1, 0.5, 1.0)],
    "all": [(0.7, 0.8, 0.01, 20, -1), (0.7, 0.95, 0.0, 50, -1), (2.0, 0.9, 0.2, 3, -1), (1.0, 0.5, 0.05, 0, -1)] * 2,
}


@pytest.mark.parametrize("numbers", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "spread"), [(53, 1.0), (2051, 3.0), (32000, 0.0), (32000, 2.0), (32000, 8.0)])
def test_draws_are_the_kernels(kernels, width, spread, dtype, numbers):
    for seed in range(2):
        expected, got = both(logits_of(width, spread, seed, dtype), numbers[:ROWS], seed=seed)
        assert got.draws.tolist() == expected.draws.tolist()
        assert got.bad.tolist() == expected.bad.tolist()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    width=st.integers(1, 700),
    spread=st.floats(0, 20),
    masked=st.floats(0, 1),
    numbers=st.lists(
        st.tuples(st.just(0.0) | NUMBER(0.0078125, 3), NUMBER(0.015625, 1), NUMBER(0, 1), st.integers(0, 900), st.just(-1)),
        min_size=ROWS,
        max_size=ROWS,
    ),
)
def test_whatever_is_asked_with_tokens_that_are_not_allowed(seed, width, spread, masked, numbers):
    logits = logits_of(width, spread, seed)
    logits[torch.rand(ROWS, width, generator=torch.Generator().manual_seed(seed)) < masked] = -torch.inf
    expected, got = both(logits, numbers, seed=seed % 1000)
    allowed = ~expected.bad
    assert got.bad.tolist() == expected.bad.tolist()
    assert got.draws[allowed].tolist() == expected.draws[allowed].tolist()


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_broken_rows_are_told_and_change_no_other(kernels, broken):
    logits, numbers = logits_of(500, 2.0, 1), [(1.0, 0.9, 0.0, 40, 2)] * ROWS
    whole = both(logits, numbers)[1].draws
    logits[2] = broken
    logits[4, 77] = torch.nan
    expected, got = both(logits, numbers)
    others = [0, 1, 3, 5]
    assert got.bad.tolist() == expected.bad.tolist() and got.bad[4] and got.draws[others].tolist() == whole[others].tolist()


@pytest.mark.parametrize("width", [1, 31, 32, 33, 5000, 5011])
def test_masks_forbid_what_the_kernels_forbid(kernels, width):
    make = torch.Generator().manual_seed(3)
    logits, index = torch.randn(5, width, generator=make), torch.tensor([3, 0, 4])
    words = torch.randint(-(2**31), 2**31, (3, -(-width // 32)), generator=make).int()
    words[1] = 0
    expected = transforms.mask_bits(logits.clone(), index, words)
    assert torch.equal(mask_bits(logits, index, words), expected) and (expected[0] == -torch.inf).all()


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_are_the_kernels(kernels, mode, dtype):
    numbers = [
        (t, p, 0.0, k, n)
        for t, p, k, n in ((0, 1, 0, 5), (1, 1, 0, 0), (1, 0.9, 0, 3), (0.7, 1, 9, 4), (0, 1, 0, -1), (1, 1, 0, 20))
    ]
    logits = logits_of(3001, 3.0, 2)
    logits[:, ::2] += 20 * torch.rand(ROWS, 1501)  # few ties, also as bf16
    expected, got = (result.logprobs for result in both(logits.to(dtype), numbers, mode))
    assert got.row.tolist() == expected.row.tolist() and got.k.tolist() == expected.k.tolist()
    assert got.rank.tolist() == expected.rank.tolist()
    for row, k in enumerate(expected.k.tolist()):
        finite = expected.values[row, : 1 + k].isfinite()
        torch.testing.assert_close(got.values[row, : 1 + k], expected.values[row, : 1 + k], atol=2e-5, rtol=1e-5)
        assert (
            sorted(got.token_ids[row, : 1 + k][finite].tolist()) == sorted(expected.token_ids[row, : 1 + k][finite].tolist())
            or dtype == torch.bfloat16
        )
