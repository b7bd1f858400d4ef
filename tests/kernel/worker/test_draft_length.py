"""The number of drafts follows what was measured, and drafting never costs more than it brings."""

from types import SimpleNamespace

import numpy as np
import pytest

from kernel_core.nn.draft_length import DraftLength, DraftOutcome
from kernel_core.plan import StepPlan

WIDTH, STEPS, MS = 5, 1000, 1e-3


def plan(slots, drafts=0):
    """Of a decode step of these slots, which verifies so many drafts in each."""
    one = np.ones(len(slots), np.int32)
    return StepPlan(0, slots.astype(np.int32), one, one + drafts, one + drafts, one, one)


def simulate(share, fixed, each, rows, *, tree=False, noise=0.02, seed=0):
    """Runs steps whose time is (fixed + each * drafts) and whose drafts are right with probability `share` one by one.
    → (tokens per second with the chosen lengths, the same without drafts, lengths of the last steps)."""
    rng = np.random.default_rng(seed)
    length, slots = DraftLength(WIDTH, rows, tree), np.arange(rows)
    for slot in slots:
        length.opened(SimpleNamespace(slot=slot))
    drafts, tokens, seconds, chosen = np.zeros(rows, np.int32), 0, 0.0, []
    for _ in range(STEPS):
        run = (rng.random((rows, WIDTH)) < np.broadcast_to(np.asarray(share), (rows,))[:, None]).cumprod(1).sum(1)
        accepted = np.minimum(run, drafts).astype(np.int32)
        took = (fixed + each * drafts.sum()) * (1 + noise * abs(rng.standard_normal()))
        length.observe(DraftOutcome(slots, drafts, accepted, True, took))
        tokens, seconds = tokens + rows + accepted.sum(), seconds + took
        drafts = length.lengths(slots)
        chosen.append(drafts)
    return tokens / seconds, rows / (fixed * (1 + noise * 0.8)), np.array(chosen[-400:])


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize(("share", "each"), [(0.0, 0.001), (0.0, 0.3), (0.1, 0.1), (0.3, 0.4), (0.9, 0.8)])
def test_drafting_never_loses_more_than_three_percent(share, each, rows, tree):
    """`each`: what one draft in every row adds to the step's time."""
    fast, plain, _ = simulate(share, 1.0, each / rows, rows, tree=tree)
    assert fast >= 0.97 * plain


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(("share", "each"), [(0.8, 0.01), (0.6, 0.05), (0.9, 0.002)])
def test_chains_come_near_the_best_fixed_length(share, each, rows):
    each /= rows
    fast, _, _ = simulate(share, 1.0, each, rows)
    gains = np.cumsum(share ** np.arange(WIDTH + 1))
    best = (rows * gains / (1.0 + each * rows * np.arange(WIDTH + 1))).max()
    assert fast >= 0.93 * best


def test_each_request_gets_its_own_length():
    _, _, chosen = simulate([0.9, 0.05], 1.0, 0.1, 2)
    good, bad = np.median(chosen, 0)
    assert good >= 3 and bad == 0


def serve(share, own, each, steps=3000, life=60, keeps_up=True, saved=0.0):
    """Single requests of `life` steps of 1 ms one after the other, a drafter that takes `own` ms whenever it is asked; the step
    then takes `saved` longer, too. `share`: as above, a number or one for each step →
    (tokens per second relative to no drafter, share of steps in which it slept, lengths that were asked for)."""
    rng, length = np.random.default_rng(1), DraftLength(WIDTH, 2, keeps_up=keeps_up)
    slots, drafts, tokens, seconds, slept, chosen = np.array([0]), 0, 0, 0.0, 0, []
    shares = np.broadcast_to(share, steps)
    for step in range(steps):
        if step % life == 0:
            length.closed(0)
            length.opened(SimpleNamespace(slot=0))
            drafts = 0
        accepted = min(int((rng.random(WIDTH) < shares[step]).cumprod().sum()), drafts)
        if length.unweighed(1):
            length.weighed(1, saved * MS)
        asleep = not length.asks(plan(slots, drafts))
        proposed = 0 if asleep else int(length.lengths(slots)[0])
        took = 1.0 + each * drafts + (0.0 if asleep else own + saved)
        one = np.array([drafts], np.int32), np.array([accepted], np.int32)
        if not asleep or length.rest(1):
            length.observe(DraftOutcome(slots, *one, True, took * MS, 0.0 if asleep else own * MS, proposed, not asleep))
        tokens, seconds, slept = tokens + 1 + accepted, seconds + took, slept + asleep
        drafts = proposed
        chosen.append(proposed)
    return tokens / seconds, slept / steps, chosen


@pytest.mark.parametrize("keeps_up", [False, True])
@pytest.mark.parametrize("saved", [0.0, 0.2])
@pytest.mark.parametrize(("share", "own", "each"), [(0.0, 0.3, 0.1), (0.1, 0.2, 0.2), (0.4, 0.15, 0.5), (0.0, 0.01, 0.1)])
def test_a_drafter_that_does_not_pay_for_itself_is_rarely_asked(share, own, each, keeps_up, saved):
    speed, slept, chosen = serve(share, own, each, steps=6000, keeps_up=keeps_up, saved=saved)
    assert speed >= 0.97
    assert slept > 0.9 or (keeps_up and own < 0.02 and not saved)
    assert any(chosen[500:]), "it was never tried again"


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_drafter_that_takes_longer_than_the_target_is_found_out_soon(share):
    """As heads on a tiny model: what they cost before they sleep is lost, so it must be little."""
    speed, _, chosen = serve(share, 1.5, 0.1, steps=6000)
    assert speed >= 0.97 and not any(chosen[40:500])
    assert any(chosen), "it was never tried"


@pytest.mark.parametrize("period", [7, 60, 500])
def test_luck_that_turns_costs_little(period):
    """As long as it is good drafting wins much; what is lost when it turns is bounded all the same."""
    share = np.where(np.arange(6000) // period % 2, 0.0, 0.9)
    speed, _, _ = serve(share, 0.4, 0.3, steps=6000)
    assert speed >= 0.97


@pytest.mark.parametrize("known", [False, True])
def test_a_drafter_that_finds_nothing_is_rarely_asked(known):
    """`known`: it found something in the first request."""
    length, slots, drafts, asked = DraftLength(WIDTH, 1), np.array([0]), np.zeros(1, np.int32), []
    for step in range(2000):
        if step % 1000 == 0:
            length.opened(SimpleNamespace(slot=0))
        asks = length.asks(plan(slots, drafts))
        finds = WIDTH if known and step < 100 else 0
        proposed = min(int(length.lengths(slots)[0]), finds) if asks else 0
        if asks or length.rest(1):
            seconds = 1.0 + 0.1 * asks + 0.1 * float(drafts[0])
            length.observe(DraftOutcome(slots, drafts, drafts, True, seconds, 0.1 * asks, proposed, asks))
        drafts = np.array([proposed], np.int32)
        asked.append(asks)
    assert np.mean(asked[1000:]) < 0.1 and any(asked[1000:])


def test_a_drafter_that_pays_for_itself_does_not_sleep():
    speed, slept, _ = serve(0.8, 0.15, 0.02)
    assert slept == 0 and speed > 2


def test_rows_that_layers_missed_are_not_drafted_for():
    length = DraftLength(WIDTH, 4, keeps_up=True)
    for slot in (0, 1):
        length.opened(SimpleNamespace(slot=slot))
    length._behind[0], slots, drafts, total = True, np.array([0, 1]), np.zeros(2, np.int32), 0
    for _ in range(50):
        length.observe(DraftOutcome(slots, drafts, drafts, True, 1.0 + 0.01 * drafts.sum()))
        drafts = length.lengths(slots)
        assert drafts[0] == 0
        total += int(drafts[1])
    assert total > 100 and length.asks(plan(slots))
    length.closed(1)
    assert not length.asks(plan(slots))


def test_hopeless_drafts_are_off_and_tried_again():
    _, _, chosen = simulate(0.0, 1.0, 0.5, 4)
    assert np.median(chosen) == 0 and chosen.max() > 0


@pytest.mark.parametrize("tree", [False, True])
def test_no_row_gets_more_than_its_request_wants(tree):
    length, slots, most = DraftLength(WIDTH, 4, tree), np.arange(4), np.array([0, 1, WIDTH, 99])
    for slot in slots:
        length.opened(SimpleNamespace(slot=slot))
    drafts, seen = np.zeros(4, np.int32), []
    for _ in range(300):
        took = 1.0 + 0.01 * drafts.sum()
        length.observe(DraftOutcome(slots, drafts, drafts, True, took))
        drafts = length.lengths(slots, most)
        seen.append(drafts)
    assert (np.array(seen) <= np.minimum(most, WIDTH)).all()
    assert np.median(seen[-100:], 0).tolist() == [0, 1, WIDTH, WIDTH]
    assert not length.lengths(slots, np.zeros(4, int)).any()
