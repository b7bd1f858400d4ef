"""The random function is the named one, bit for bit, and draws follow the distribution that is asked for."""

import numpy as np
import pytest
import torch
from toy_worker import numpy_bits, numpy_filter, numpy_gumbel

from kernel_core.nn.draws import draw, draw_kept, gumbel, split_key, token_bits, uniform
from kernel_core.nn.sampler import lowest_kept
from kernel_core.plan import SamplingRow

KEYS = [0, 1, 0xFFFFFFFF, 2**63 + 12345, 2**64 - 1]


def keys(values) -> torch.Tensor:
    return torch.tensor([split_key(k) for k in values], dtype=torch.int32)


def test_bits_are_the_written_function():
    positions = [0, 1, 77, 2**31 - 1, 2**20]
    bits = token_bits(keys(KEYS), torch.tensor(positions), 1001).numpy().view(np.uint32)
    for row, (key, position) in enumerate(zip(KEYS, positions)):
        np.testing.assert_array_equal(bits[row], numpy_bits(key, position, 1001))


def test_uniforms_are_rounded_once_and_stay_below_one():
    edge = [0, 1, 2**24 - 1, 2**24, 2**24 + 1, 2**25 + 1, 2**31 - 1, 2**31, 2**31 + 128, 2**32 - 384, 2**32 - 128, 2**32 - 1]
    bits = np.concatenate([np.array(edge, np.uint32), np.random.default_rng(0).integers(0, 2**32, 100_000, np.uint32)])
    noise = gumbel(torch.from_numpy(bits.view(np.int32)))
    assert noise.isfinite().all()
    np.testing.assert_allclose(noise.numpy(), numpy_gumbel(bits), rtol=2e-6, atol=2e-6)
    exact = np.minimum(((bits.astype(np.float64) + 0.5) / 2**32).astype(np.float32), np.float32(1 - 2**-24))
    np.testing.assert_array_equal(uniform(torch.from_numpy(bits.view(np.int32))).numpy(), exact)


@pytest.mark.parametrize("size", [8, 203, 1000])
def test_noise_does_not_depend_on_the_rows_beside_it(size):
    bits = token_bits(keys(KEYS), torch.arange(5), size)
    together = gumbel(bits)
    for row in range(5):
        assert torch.equal(gumbel(bits[row : row + 1]), together[row : row + 1])


@pytest.mark.parametrize(
    "row",
    [
        SamplingRow(temperature=1.0),
        SamplingRow(temperature=0.6, top_k=4),
        SamplingRow(temperature=1.5, top_p=0.7),
        SamplingRow(temperature=1.0, min_p=0.1),
        SamplingRow(temperature=1.2, top_k=7, top_p=0.85, min_p=0.02),
    ],
)
def test_draws_follow_the_filtered_softmax(row):
    """Chi-square over 40,000 draws, positions 0..n of one key, against the probabilities written out in numpy."""
    n, logits = 40_000, np.random.default_rng(5).normal(0, 2, 12).astype(np.float32)
    x = torch.from_numpy(logits)[None] / row.temperature
    numbers = (torch.tensor([row.min_p]), torch.tensor([row.top_k]), torch.tensor([row.top_p]))
    kept = x.masked_fill(x < lowest_kept(x, *numbers, 12)[0], float("-inf")).expand(n, -1)
    got = draw(kept, keys([42]).expand(n, -1), torch.arange(n))
    truth = numpy_filter(logits, row)
    prob = np.exp(truth - truth.max()) / np.exp(truth - truth.max()).sum()
    count = np.bincount(got.numpy(), minlength=12)
    assert count[prob == 0].sum() == 0
    expected = prob[prob > 0] * n
    chi2 = ((count[prob > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom) + 4  # about 1 in 10,000 by chance


def test_neighbouring_positions_and_keys_draw_independently():
    """Pairs of draws over a uniform distribution of 4 fill the 16 cells evenly."""
    n, flat = 32_000, torch.zeros(32_000, 4)
    base = draw(flat, keys([7]).expand(n, -1), torch.arange(n))
    next_key = draw(flat, keys([8]).expand(n, -1), torch.arange(n))
    by_key = draw(torch.zeros(n, 4), keys(range(n)), torch.zeros(n, dtype=torch.int64))
    for a, b in ((base[:-1], base[1:]), (base, next_key), (by_key[:-1], by_key[1:])):
        cells = np.bincount((a * 4 + b).numpy(), minlength=16)
        expected = len(a) / 16
        assert ((cells - expected) ** 2 / expected).sum() < 15 + 4 * np.sqrt(30) + 4


@pytest.mark.parametrize("few", [False, True])
def test_drawing_from_few_tokens_is_the_same_draw(few):
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 1, (300, 203)).astype(np.float32))
    logits[logits < (1.5 if few else -9)] = float("-inf")
    key, position = keys(range(300)), torch.arange(300)
    assert torch.equal(draw(logits, key, position), draw_kept(logits.clone(), key, position))
