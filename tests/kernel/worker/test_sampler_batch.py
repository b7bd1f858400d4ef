"""Filters by their definitions, rows that do not feel each other, logprobs in four modes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_worker import CPU, numpy_bits, numpy_filter, numpy_gumbel

from kernel_core.nn.inputs import layout
from kernel_core.nn.protocols import StepView
from kernel_core.nn.sampler import Sampler, lowest_kept
from kernel_core.nn.slots import SlotTable
from kernel_core.plan import Opened, SamplingRow, StepPlan

SIZE = 203


def sample(rows: list[SamplingRow], logits: torch.Tensor, mode="raw_logprobs", transform=None, slots=None, keys=None):
    """Each row on a slot of its own, one token known (a different number of them a slot), no drafts."""
    slots = list(range(len(rows))) if slots is None else slots
    table = SlotTable(64, 100, 0, CPU)
    table.open([Opened(s, "r", np.arange(s + 1), 0, 1000 + s, r) for s, r in zip(slots, rows)])
    one = np.ones(len(rows), np.int32)
    plan = StepPlan(0, np.array(slots, np.int32), one * 0, one, one, one * 0, one * 0)
    where, nothing = torch.tensor(slots), torch.zeros(0)
    view = StepView(
        *[nothing] * 6,
        slot=where,
        row=torch.arange(len(rows)),
        draft_pos=nothing,
        position=where + 1,
        ancestors=torch.zeros(len(rows), 0),
        drafts=nothing,
        history=table.tokens,
        known=table.known,
        num_prompt=table.num_prompt,
    )
    sampler = Sampler(table, logits.shape[1], mode)
    return sampler(logits.clone(), view, layout(plan), transform)


def random_rows(seed: int, n: int) -> list[SamplingRow]:
    rng = np.random.default_rng(seed)
    pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    return [
        SamplingRow(
            pick(0.0, 0.5, 1.0, 1.7), pick(0, 0, 1, 5, 500), pick(1.0, 1.0, 0.3, 0.9), pick(0.0, 0.0, 0.1), pick(-1, -1, 0, 3)
        )
        for _ in range(n)
    ]


@given(seed=st.integers(0, 10_000), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_filters_keep_what_the_definitions_keep(seed, ties):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (1, SIZE)).astype(np.float32)
    if ties:
        logits = logits.round()
    row = SamplingRow(1.0, int(rng.integers(0, 12)), float(rng.choice([1.0, 0.2, 0.5, 0.95])), float(rng.choice([0, 0.05, 0.3])))
    x = torch.from_numpy(logits)
    numbers = (torch.tensor([row.min_p]), torch.tensor([row.top_k]), torch.tensor([row.top_p]))
    kept = x >= lowest_kept(x, *numbers, SIZE)[0]
    if ties and row.top_k and row.top_p < 1:
        assert kept.any()  # numpy_filter counts tied tokens beyond k into the mass, the kernel does not
    else:
        assert (kept.numpy()[0] == np.isfinite(numpy_filter(logits[0], row))).all()


def test_top_p_after_top_k_counts_k_tokens_also_among_ties():
    x = torch.tensor([[2.0, 1.0, 1.0, 1.0, 1.0, 0.0]])
    both = (torch.tensor([0.0]), torch.tensor([2]), torch.tensor([0.99]))
    for width in (2, 4, 6):  # what other rows of the batch need must not matter
        assert (x >= lowest_kept(x, *both, width)[0]).tolist() == [[True] * 5 + [False]]


@given(seed=st.integers(0, 10_000), first=st.integers(12, 60))
@settings(max_examples=30, deadline=None)
def test_a_first_look_at_the_best_tokens_changes_nothing(seed, first):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(0, rng.uniform(0.1, 4), (5, SIZE)).astype(np.float32).round(1))
    min_p, top_k = rng.choice([0, 0.1], 5), rng.choice([0, 0, 3, 12], 5)
    numbers = [torch.tensor(a, dtype=torch.float32) for a in (min_p, top_k, rng.choice([0.3, 0.9, 1.0], 5))]
    short, enough = lowest_kept(x, numbers[0], numbers[1].int(), numbers[2], first)
    full, all_seen = lowest_kept(x, numbers[0], numbers[1].int(), numbers[2], SIZE)
    assert all_seen.all() and torch.equal(short[enough], full[enough])
    assert enough[numbers[1] > 0].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_a_rows_result_is_bitwise_the_same_in_any_batch(seed, dtype):
    rows = random_rows(seed, 9)
    logits = torch.from_numpy(np.random.default_rng(seed).normal(0, 3, (9, SIZE)).astype(np.float32)).to(dtype)
    together = sample(rows, logits)
    for i, row in enumerate(rows):
        alone = sample([row], logits[i : i + 1], slots=[i])
        pair = sample([row, rows[0]], logits[[i, 0]], slots=[i, 40])
        assert together.draws[i] == alone.draws[0] == pair.draws[0]
        if row.logprobs >= 0:
            place = together.logprobs.where.tolist().index(i)
            width = 1 + row.logprobs
            assert torch.equal(together.logprobs.values[place, :width], alone.logprobs.values[0, :width])
            assert torch.equal(together.logprobs.values[place, :width], pair.logprobs.values[0, :width])
            assert together.logprobs.rank[place] == alone.logprobs.rank[0]


@pytest.mark.parametrize("looks", [(8, 30), (256, 4096)])
def test_heterogeneous_rows_draw_what_numpy_draws(looks, monkeypatch):
    monkeypatch.setattr("kernel_core.nn.sampler.LOOKS", looks)
    rows = random_rows(11, 24)
    logits = np.random.default_rng(1).normal(0, 3, (24, SIZE)).astype(np.float32)
    got = sample(rows, torch.from_numpy(logits)).draws.tolist()
    for i, row in enumerate(rows):
        noise = numpy_gumbel(numpy_bits(1000 + i, i + 1, SIZE))
        want = numpy_filter(logits[i], row) + noise if row.temperature else logits[i]
        assert got[i] == int(np.argmax(want))


def test_a_first_look_that_is_too_short_is_followed_by_a_full_one(monkeypatch):
    monkeypatch.setattr("kernel_core.nn.sampler.LOOKS", (4,))
    row, logits = SamplingRow(2.0, top_p=0.9), np.random.default_rng(3).normal(0, 1, SIZE).astype(np.float32)
    got = sample([row] * 60, torch.from_numpy(logits).repeat(60, 1)).draws.tolist()
    kept = numpy_filter(logits, row)
    assert got == [int(np.argmax(kept + numpy_gumbel(numpy_bits(1000 + i, i + 1, SIZE)))) for i in range(60)]


def test_ties_of_greedy_rows_go_to_the_lowest_id():
    logits = torch.zeros(3, SIZE)
    logits[1, [50, 20, 90]] = 4.0
    assert sample([SamplingRow(0.0)] * 3, logits).draws.tolist() == [0, 20, 0]


def test_a_greedy_batch_makes_no_noise_and_no_sort(monkeypatch):
    import kernel_core.nn.sampler as module

    def never(*_):
        raise AssertionError("greedy rows need no draw")

    monkeypatch.setattr(module, "draw", never)
    monkeypatch.setattr(module, "draw_kept", never)
    monkeypatch.setattr(module, "lowest_kept", never)
    logits = torch.randn(4, SIZE)
    assert sample([SamplingRow(0.0)] * 4, logits).draws.tolist() == logits.argmax(-1).tolist()


def softmax_log(x):
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"])
def test_logprobs_modes(mode):
    """raw: before the transforms; processed: after transforms, temperature and filters. Chosen first, best next, rank."""
    rows = [SamplingRow(0.0, logprobs=2), SamplingRow(0.8, 5, 0.9, logprobs=4), SamplingRow(1.0), SamplingRow(0.5, logprobs=0)]
    logits = np.random.default_rng(2).normal(0, 2, (4, SIZE)).astype(np.float32)

    def shift(x, view):
        return x.sub_(torch.arange(SIZE) * 0.02)

    got = sample(rows, torch.from_numpy(logits), mode, shift)
    assert got.logprobs.where.tolist() == [0, 1, 3] and got.logprobs.k.tolist() == [2, 4, 0]
    for place, i in enumerate([0, 1, 3]):
        x = logits[i].astype(np.float64)
        if mode.startswith("processed"):
            x = x - np.arange(SIZE) * 0.02
            x = numpy_filter(x, rows[i]) if rows[i].temperature else x
        x = softmax_log(x) if mode.endswith("logprobs") else x
        chosen, best = int(got.draws[i]), np.argsort(-x, kind="stable")[: rows[i].logprobs]
        ids = got.logprobs.token_ids[place].tolist()
        assert ids[0] == chosen and ids[1 : 1 + rows[i].logprobs] == best.tolist()
        np.testing.assert_allclose(got.logprobs.values[place, : 1 + rows[i].logprobs], x[[chosen, *best]], rtol=1e-4, atol=1e-4)
        assert got.logprobs.rank[place] == 1 + (x > x[chosen]).sum()


def test_nan_and_all_masked_rows_are_told_and_alone():
    rows = [SamplingRow(0.0), SamplingRow(1.0), SamplingRow(0.0), SamplingRow(1.0, 3, 0.5)]
    logits = torch.randn(4, SIZE)
    good = sample(rows, logits).draws
    logits[1, 7] = float("nan")
    logits[2] = float("-inf")
    got = sample(rows, logits)
    assert got.bad.tolist() == [False, True, True, False]
    assert got.draws[0] == good[0] and got.draws[3] == good[3]
