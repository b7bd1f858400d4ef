from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cpu import pointwise
from kernel_cpu.sampling import HostSampler

from kernel_core.nn import draws
from kernel_core.nn.slots import SlotTable


def inputs(rows, width, spread, seed=0):
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, width, generator=make) * spread
    key = torch.randint(-(2**31), 2**31, (rows, 2), generator=make).int()
    return logits, key, torch.randint(0, 1 << 20, (rows,), generator=make)


def draw(logits, key, position):
    """What the device's sampler draws for requests with these keys, at temperature 1 and without filters."""
    rows = np.arange(len(logits))
    slots = SlotTable(len(rows), 8, 0, torch.device("cpu"))
    slots.key[rows] = key
    for name in ("temperature", "top_p"):
        slots.host[name][rows] = 1.0
        getattr(slots, name)[rows] = 1.0
    view = SimpleNamespace(slot=torch.from_numpy(rows), position=position)
    layout = SimpleNamespace(logits_slot=rows, logits_row=rows)
    slots.host["logprobs"][rows] = -1
    return HostSampler(slots, logits.shape[1], "raw_logprobs")(logits.clone(), view, layout, None).draws


@pytest.mark.parametrize("width", [1, 7, 2048, 2051, 151936])
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0, 1e4])
def test_draws_are_the_kernels_token_for_token(kernels, width, spread):
    for seed in range(20 if width < 10000 else 3):
        case = inputs(5, width, spread, seed)
        assert torch.equal(draw(*case), draws.draw(*case))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 300), st.floats(0, 30), st.floats(0, 1))
def test_draws_with_tokens_that_are_not_allowed(seed, rows, width, spread, share):
    logits, key, position = inputs(rows, width, spread, seed)
    logits[torch.rand(rows, width, generator=torch.Generator().manual_seed(seed)) < share] = -torch.inf
    assert torch.equal(draw(logits, key, position), draws.draw(logits, key, position))


def test_a_tie_goes_to_the_first_as_in_the_kernel(kernels):
    logits = torch.full((2, 3000), -1e9)  # so large that the noise is lost in rounding: all tie
    _, key, position = inputs(2, 1, 1.0)
    assert draw(logits, key, position).tolist() == draws.draw(logits, key, position).tolist() == [0, 0]


def test_near_ties_are_decided_by_the_kernels_arithmetic(kernels):
    """Logits that cancel the noise: every token is within rounding of every other."""
    _, key, position = inputs(4, 1, 1.0)
    noise = draws.gumbel(draws.token_bits(key, position, 12))
    assert torch.equal(draw(-noise, key, position), draws.draw(-noise, key, position))


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_broken_logits_draw_some_token(kernels, broken):
    logits, key, position = inputs(3, 500, 1.0)
    logits[1, 77] = broken
    logits[2] = -torch.inf
    got = draw(logits, key, position)
    assert ((got >= 0) & (got < 500)).all() and got[0] == draws.draw(logits, key, position)[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_argmax_is_torchs_where_logits_tie_or_break(kernels, dtype):
    logits = torch.randint(0, 4, (6, 1003)).to(dtype)
    logits[1] = -torch.inf
    logits[2, 500] = torch.nan
    assert torch.equal(pointwise.argmax(logits), logits.argmax(-1))
