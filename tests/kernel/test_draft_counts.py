"""What drafts brought is counted per request and per engine, by the rows that verified any."""

import numpy as np

from kernel_core.columns import Events, Outcome, build
from kernel_core.plan import StepResult
from kernel_core.request import ABORT, DraftCounts


def ints(*values):
    return np.array(values, np.int32)


def step(gained, drafted, accepted):
    offsets = np.concatenate([[0], np.cumsum(gained)]).astype(np.int32)
    tokens, zeros = np.arange(offsets[-1], dtype=np.int32), np.zeros(len(gained), np.int32)
    return StepResult(1, tokens, offsets, zeros, ints(*drafted), ints(*accepted), zeros)


def test_updates_carry_the_drafts_of_the_rows_that_they_show():
    result = step((2, 0, 1), (3, 0, 2), (1, 0, 0))
    updates = build(Outcome.of(["a", "b", "c"], ints(5, 5, 5), np.diff(result.offsets)), result, {})
    assert updates.requests == ("a", "c")
    assert (updates.drafted.tolist(), updates.accepted.tolist()) == ([3, 2], [1, 0])


def test_requests_that_ended_elsewhere_have_none():
    result = step((2,), (3,), (1,))
    events = Events()
    events.add("gone", ABORT)
    updates = events.append_to(build(Outcome.of(["a"], ints(5), np.diff(result.offsets)), result, {}))
    assert (updates.drafted.tolist(), updates.accepted.tolist()) == ([3, 0], [1, 0])


def test_steps_without_drafts_carry_nothing():
    result = step((1, 1), (0, 0), (0, 0))
    assert build(Outcome.of(["a", "b"], ints(5, 5), np.diff(result.offsets)), result, {}).drafted is None


def test_counts_by_place_and_the_mean_length():
    counts = DraftCounts()
    counts.add(ints(3, 0, 3), ints(2, 0, 0))
    counts.add(ints(3, 2), ints(3, 1))
    assert (counts.steps, counts.drafted, counts.accepted, counts.by_place) == (4, 11, 6, [3, 2, 1])
    assert counts.mean_length == 1 + 6 / 4
    assert DraftCounts().mean_length == 1
