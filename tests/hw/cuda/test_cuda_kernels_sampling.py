"""Draws and filters: the tokens of the kernel's own sampler, whose arithmetic is written out here."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_cuda.kernels import sampling

GPU = torch.cuda.is_available()
MASK = (1 << 32) - 1


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """In the interpreter: vocabularies of one part and a bit, and lists that fit what is drawn here."""
    if not GPU:
        monkeypatch.setattr(sampling, "PART", 512)
        monkeypatch.setattr(sampling, "ROOM", 1024)


def fmix(x):
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)


def gumbel(key, position, vocab):
    """float64 [n, V] noise; key int32 [n, 2]."""
    low, high = (key[:, i].long() & MASK for i in (0, 1))
    a = fmix(low ^ fmix((position + 0x9E3779B9) & MASK))
    b = fmix(high ^ fmix((a + 0x7F4A7C15) & MASK))
    x = (torch.arange(vocab, device=key.device) * 0x9E3779B9 + a[:, None]) & MASK
    x = (((x ^ (x >> 16)) * 0x85EBCA6B) & MASK) ^ b[:, None]
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    x = x ^ (x >> 16)
    u = ((x.double() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-u))


def kept(logits, min_p, top_k, top_p):
    """Which of one row's float32 logits the filters keep, by sorting."""
    best = logits.max()
    floor = best + min_p.log()
    order = logits.sort(descending=True).values
    if top_k > 0:
        floor = torch.maximum(floor, order[min(int(top_k), len(order)) - 1])
    inside = order >= floor
    if top_k > 0:
        inside &= torch.arange(len(order), device=order.device) < top_k
    if top_p < 1:
        weights = ((order - best).exp() * 2.0**30).int().masked_fill(~inside, 0)
        mass = weights.cumsum(0, dtype=torch.int64)
        first = (mass.double() >= top_p.double() * mass[-1].double()).int().argmax()
        floor = torch.maximum(floor, order[first])
    return logits >= floor


def settings(device, count):
    torch.manual_seed(0)
    pick = lambda *values: torch.tensor(values, device=device)[torch.randint(len(values), (count,), device=device)]  # noqa: E731
    key = torch.randint(-(2**31), 2**31, (count, 2), dtype=torch.int32, device=device)
    return {
        "temperature": pick(0.0, 0.7, 1.0, 1.7), "min_p": pick(0.0, 0.05, 0.3), "top_k": pick(0, 1, 5, 40).int(),
        "top_p": pick(1.0, 0.9, 0.5, 0.05), "key": key,
    }  # fmt: skip


def check(device, logits, given):
    """The kernel's tokens are the expected ones wherever those are not within rounding of another token."""
    count, vocab = logits.shape
    slot = torch.randperm(count, device=device)
    position = torch.randint(0, 10000, (count,), device=device)
    tokens, bad = sampling.sample(logits, slot, position, **given)
    noise = gumbel(given["key"][slot], position, vocab)
    differ = 0
    for n in range(count):
        temperature, min_p, top_k, top_p = (given[name][slot[n]] for name in ("temperature", "min_p", "top_k", "top_p"))
        row = logits[n].float()
        if not temperature > 0:
            assert tokens[n] == row.argmax()
            continue
        row = row / temperature
        keep = kept(row, min_p, top_k, top_p)
        assert keep[tokens[n]]
        noisy = (row.double() + noise[n]).masked_fill(~keep, -torch.inf)
        assert noisy[tokens[n]] >= noisy.max() - 1e-5
        differ += int(tokens[n] != noisy.argmax())
    assert differ <= count // 50
    assert not bad.any()


def test_rows_with_all_settings(device):
    check(device, torch.randn(10, 600, device=device) * 3, settings(device, 10))


def test_rows_of_several_parts(device, monkeypatch):
    """Flat and peaked rows, with lists that are long enough and one that is not."""
    torch.manual_seed(4)
    monkeypatch.setattr(sampling, "PART", 256)
    scale = torch.tensor([0.01, 0.3, 1, 4, 30, 200], device=device)[:, None]
    check(device, torch.randn(6, 600, device=device) * scale, settings(device, 6))
    monkeypatch.setattr(sampling, "ROOM", 64)
    check(device, torch.randn(6, 600, device=device) * scale, settings(device, 6))


def test_equal_logits(device):
    """Rows of few distinct values: ties at every threshold."""
    torch.manual_seed(1)
    check(device, torch.randint(-3, 3, (8, 300), device=device).float(), settings(device, 8))


def test_forbidden_tokens_and_half_precision(device):
    torch.manual_seed(2)
    logits = (torch.randn(8, 600, device=device) * 4).masked_fill(torch.rand(8, 600, device=device) > 0.1, -torch.inf)
    check(device, logits.half(), settings(device, 8))


def test_rows_that_cannot_be_sampled(device):
    logits = torch.randn(3, 90, device=device)
    logits[0, 7] = torch.nan
    logits[1] = -torch.inf
    given = settings(device, 3)
    slot = torch.arange(3, device=device)
    assert sampling.sample(logits, slot, slot, **given)[1].tolist() == [True, True, False]


def test_argmax_takes_the_first_and_nan_is_largest(device):
    logits = torch.tensor([[1.0, 5, 5, 2], [-torch.inf] * 4, [3, torch.nan, 9, torch.nan], [-0.0, 0.0, -1, -2]], device=device)
    tokens, bad = sampling.argmax(logits)
    assert tokens.tolist() == [1, 0, 1, 0]
    assert bad.tolist() == [False, True, True, False]


def test_draw(device):
    torch.manual_seed(0)
    logits = torch.randn(6, 900, device=device)
    key = torch.randint(-(2**31), 2**31, (6, 2), dtype=torch.int32, device=device)
    position = torch.arange(6, device=device)
    noisy = logits.double() + gumbel(key, position, 900)
    one, off = torch.ones(6, device=device), torch.zeros(6, device=device)
    drawn, _ = sampling.sample(logits, torch.arange(6, device=device), position, one, off, off.int(), one, key, filters=False)
    assert torch.equal(drawn, noisy.argmax(-1))


def test_thresholds_are_searched_in_what_was_listed(device, monkeypatch):
    """Kernels of different sizes add the bins' floats in different orders, and may bound them by other bins."""
    torch.manual_seed(6)
    logits, slot, one = torch.randn(8, 900, device=device) * 2, torch.arange(8, device=device), torch.ones(8, device=device)
    asked = logits, slot, one, 0 * one, torch.zeros_like(slot, dtype=torch.int32), 0.9 * one
    expected, floors = sampling.filtered(*asked), sampling._floors

    class Disturbed:
        def __getitem__(self, grid):
            def launch(*args, **options):
                table, found, listed = args[7], args[9], args[10]
                table[:, 30:] += 20  # tokens a bin
                listed[torch.arange(listed.shape[1], device=device) >= found] = 1 << 30  # there may be anything
                floors[grid](*args, **options)

            return launch

    monkeypatch.setattr(sampling, "_floors", Disturbed())
    assert torch.equal(sampling.filtered(*asked), expected)


def test_what_is_drawn_from(device):
    torch.manual_seed(4)
    logits, given, slot = torch.randn(20, 900, device=device) * 3, settings(device, 20), torch.randperm(20, device=device)
    temperature, min_p, top_k, top_p = (given[name] for name in ("temperature", "min_p", "top_k", "top_p"))
    got = sampling.filtered(logits, slot, temperature, min_p, top_k, top_p)
    scaled = logits / torch.where(temperature > 0, temperature, 1.0)[slot, None]
    for row, at, told in zip(scaled, slot.tolist(), got, strict=True):
        wanted = row.masked_fill(~kept(row, min_p[at], top_k[at], top_p[at]), -torch.inf)
        torch.testing.assert_close(told, wanted, atol=1e-6, rtol=1e-6)
    plain = sampling.filtered(logits, slot, temperature, min_p, top_k, top_p, filters=False)
    torch.testing.assert_close(plain, scaled, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize("as_they_are", [False, True])
def test_ranks_and_logprobs(device, k, as_they_are):
    torch.manual_seed(0)
    logits = torch.randn(6, 900, device=device) * 6
    logits[1, 100:], logits[2] = -torch.inf, logits[2].round()
    logits[3] += 1e4
    chosen = torch.tensor([0, 99, 700, 5, 899, 3], device=device)
    chosen[4] = logits[4].argmax()
    ids, values, rank = sampling.rank(logits, chosen, k, as_they_are)
    wanted = logits.double() if as_they_are else logits.double().log_softmax(-1)
    best = wanted.topk(k, -1)
    assert ids[:, 0].tolist() == chosen.tolist()
    assert torch.equal(wanted.gather(1, ids[:, 1:]), best.values)
    torch.testing.assert_close(values.double(), wanted.gather(1, ids), atol=2e-3, rtol=1e-5)
    assert (values[[0, 1, 2, 4, 5]] - wanted.gather(1, ids)[[0, 1, 2, 4, 5]]).abs().max() < 1e-5
    assert rank.tolist() == (1 + (logits > logits.gather(1, chosen[:, None])).sum(-1)).tolist()


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_large_vocabularies_on_a_gpu(device):
    torch.manual_seed(3)
    check(device, (torch.randn(64, 151936, device=device) * 2.5).bfloat16(), settings(device, 64))
    check(device, torch.randn(64, 128256, device=device) * 2.5, settings(device, 64))
