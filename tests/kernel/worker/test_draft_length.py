"""The number of drafts follows what was measured, and drafting never costs more than it brings."""

import numpy as np
import pytest

from kernel_core.nn.draft_length import DraftLength
from kernel_core.nn.protocols import DraftOutcome

WIDTH, STEPS = 5, 1000


def simulate(share, fixed, each, rows, *, tree=False, noise=0.02, seed=0):
    """Runs steps whose time is (fixed + each * drafts) and whose drafts are right with probability `share` one by one.
    → (tokens per second with the chosen lengths, the same without drafts, lengths of the last steps)."""
    rng = np.random.default_rng(seed)
    length, slots = DraftLength(WIDTH, rows, tree), np.arange(rows)
    for slot in slots:
        length.opened(slot)
    drafts, tokens, seconds, chosen = np.zeros(rows, np.int32), 0, 0.0, []
    for _ in range(STEPS):
        run = (rng.random((rows, WIDTH)) < np.broadcast_to(np.asarray(share), (rows,))[:, None]).cumprod(1).sum(1)
        accepted = np.minimum(run, drafts).astype(np.int32)
        took = (fixed + each * drafts.sum()) * (1 + noise * abs(rng.standard_normal()))
        length.observe(DraftOutcome(slots, drafts, accepted, int(rows + drafts.sum()), True, took))
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


def test_hopeless_drafts_are_off_and_tried_again():
    _, _, chosen = simulate(0.0, 1.0, 0.5, 4)
    assert np.median(chosen) == 0 and chosen.max() > 0
