"""How many drafts pay: measured acceptance against measured step times.

A step of n rows that verifies and proposes d drafts takes about c0 + c1 d seconds (measured per number of rows) and gives
n + sum over rows of (a + a^2 + ... + a^k) tokens, a being the row's acceptance. A row's k-th draft raises tokens per second
exactly if a^k > c1 * (tokens / seconds) of the step, so drafts are added while that holds. Now and then, ever more rarely, a
step goes the other way, with no drafts or with a few, so that both costs stay measured.

Where no row's drafts pay the drafter is not asked until the next such step or the next request. Layers of a drafter cost time
even where nothing is drafted, as they read what the target computed, and must be asked. Every step that took longer
than its tokens would have taken without the drafter makes a debt, and what a step wins pays it off. When it is too large the
drafter sleeps: it is not asked at all until a small share of the time that has passed since has paid the debt, so that share is
the most that is ever lost. Rows whose tokens its layers missed are never drafted for again; those that come after it woke are.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from kernel_core.plan import Opened, StepPlan

PROBE_AFTER, PROBE_AT_LEAST = 64, 1024  # steps until one that measures what is not in use; doubled while nothing changes
PROBE_ROWS = 4  # of them draft in such a step
WEIGH_AFTER = 8 * PROBE_AT_LEAST  # steps until what the drafter's presence costs is weighed again
WEIGHABLE = 0.01  # seconds of a step, at most
FIRST = 5  # steps of each kind before anything is decided
RENEW = 0.1  # weight of a newer measurement of time
FORGET = 0.95  # weight of what was accepted, with each newer step
ROUNDS = 4  # the threshold depends on the choice and is found by iteration
LIMIT = 8  # of the debt, in steps without the drafter
MARGIN = 0.95  # of the time without the drafter that tokens may take with it, or it does not pay: the former is an estimate
SHARE = 0.005  # of the time without the drafter that pays the debt
GLANCE = 16  # steps without the drafter, of which one is timed
PRIOR = (2.0, 3.0)  # accepted, drafted: what a request starts from, together with the average of all


@dataclass(frozen=True, slots=True)
class DraftOutcome:
    """How a step went, when its result has reached the host. Rows as in the plan; `drafted`, `accepted` [R] int32."""

    slots: np.ndarray
    drafted: np.ndarray
    accepted: np.ndarray
    decode_only: bool  # every row had exactly one token that is no draft
    seconds: float  # from the start of the step to its result
    own: float = 0.0  # of these, host seconds of `propose`
    proposed: int = 0  # drafts that `propose` returned in this step
    asked: bool = True  # False: the drafter was not


class Mean:
    """A moving mean. It starts from the least of the first few measurements, as those may have built or recorded something; one
    that was disturbed says little."""

    def __init__(self) -> None:
        self.value, self.count = 0.0, 0

    def add(self, value: float) -> None:
        self.count += 1
        if self.count <= FIRST:
            self.value = min(value, self.value) if self.count > 1 else value
        else:
            self.value += max(RENEW, 1 / (self.count - FIRST + 1)) * (min(value, 4 * self.value) - self.value)


class StepCost:
    """seconds = c0 + c1 * drafts of the steps with about the same number of rows: a line through the mean of the steps that
    neither verified nor proposed drafts, and that of the others. A step's drafts are half what it verified and half what it
    proposed."""

    def __init__(self) -> None:
        self.plain = Mean()  # seconds without drafts
        self.without = Mean()  # without the drafter: it was not asked, or what it costs is taken off
        self.saved = 0.0  # seconds that a step without the drafter saves, besides those of the drafter itself
        self.drafting, self.drafts = Mean(), Mean()  # seconds with drafts, and how many
        self.age = 0  # steps since `saved` was weighed, 0: never
        self.off = False  # no row's drafts pay, or the drafter finds none
        self.asked = 0  # times that drafts were asked for before enough were measured, since a request came
        self.since, self.interval, self.on = 0, PROBE_AFTER, True  # steps since the last probe, and until the next

    def probes(self, on: bool) -> bool:
        """Is it time to measure the other way? `on`: drafts are in use."""
        if on is not self.on:
            self.on, self.since, self.interval = on, 0, PROBE_AFTER
        self.since += 1
        if self.since < self.interval:
            return False
        self.since, self.interval = 0, min(2 * self.interval, PROBE_AT_LEAST)
        return True

    def add(self, drafts: float, seconds: float, own: float) -> None:
        self.age += bool(self.age)
        if drafts:
            self.drafting.add(seconds)
            self.drafts.add(drafts)
        else:
            self.plain.add(seconds)
            self.without.add(max(seconds - own - self.saved, 0.0))

    def line(self, always_asked: bool) -> tuple[float, float]:
        """(c0, c1), neither negative. `always_asked`: also where nothing is drafted."""
        fixed = self.plain.value if always_asked else self.without.value
        slope = max(self.drafting.value - fixed, 0.0) / max(self.drafts.value, 0.5)
        return max(fixed, 1e-9), slope


class DraftLength:
    """Decides the number of drafts per row, for a drafter of up to `width` drafts. Host; every method once per step or request.

    `tree`: drafts branch, so a row gets as many as it may or none. `keeps_up`: the drafter has layers that read every token of a
    row."""

    def __init__(self, width: int, max_slots: int, tree: bool = False, keeps_up: bool = False) -> None:
        self.width, self.tree, self.keeps_up = width, tree, keeps_up
        self._open, self._behind = np.zeros(max_slots, bool), np.zeros(max_slots, bool)
        self._debt, self._sleeping, self._rested = 0.0, False, 0
        self.accepted, self.drafted = np.zeros(max_slots), np.zeros(max_slots)
        self.overall = np.array(PRIOR)
        self.costs: defaultdict[int, StepCost] = defaultdict(StepCost)
        self.turn = 0

    def asks(self, plan: StepPlan) -> bool:
        """Is the drafter to be asked in this step? Rate: step, before it."""
        if self._sleeping:
            return False
        if self.keeps_up:
            return not self._behind.any() or bool((self._open & ~self._behind).any())
        cost = self._cost(len(plan.rows))
        if not cost.off or (plan.room > 1).any():
            return True
        cost.since += 1
        return cost.since >= cost.interval

    def closed(self, slot: int) -> None:
        """The request left the slot."""
        self._open[slot] = self._behind[slot] = False

    def opened(self, opened: Opened) -> None:
        """A request takes the slot: it starts from the average of those before it."""
        slot = opened.slot
        self._open[slot], self._behind[slot] = True, self.keeps_up and self._sleeping
        share = self.overall[0] / self.overall[1]
        self.accepted[slot], self.drafted[slot] = PRIOR[1] * share, PRIOR[1]
        for cost in self.costs.values():
            cost.off, cost.asked = False, 0

    def unweighed(self, rows: int) -> bool:
        """Is it time to weigh a step of so many rows with and without a drafter? It is, while steps are short. Rate: step."""
        cost = self._cost(rows)
        return (
            not self._sleeping and not 0 < cost.age < WEIGH_AFTER and cost.plain.count >= FIRST and cost.plain.value < WEIGHABLE
        )

    def weighed(self, rows: int, saved: float) -> None:
        """The seconds between the two: without a drafter a step may be done in another way."""
        cost = self._cost(rows)
        before, cost.saved, cost.age = cost.saved, max(saved, 0.0), 1
        cost.without.value = max(cost.without.value - (cost.saved - before), 0.0)

    def rest(self, rows: int) -> bool:
        """A step of so many rows runs without the drafter. True: `observe` it. Rate: step."""
        cost, self._rested = self._cost(rows).without, self._rested + 1
        self._debt = max(self._debt - SHARE * cost.value, 0.0)
        if self._sleeping and not self._debt:
            self._sleeping = False
            for other in self.costs.values():  # measure anew at once
                other.since = other.interval
        return not cost.count or self._rested % GLANCE == 0

    def observe(self, outcome: DraftOutcome) -> None:
        """Learn from a step. Rate: step, in order of the steps, possibly some steps late."""
        cost = self._cost(len(outcome.slots))
        if not outcome.asked:
            if outcome.decode_only:
                cost.without.add(outcome.seconds)
            return
        tried = np.minimum(outcome.accepted + 1, outcome.drafted)  # drafts behind a rejected one were not decided
        drafted = outcome.drafted > 0
        if self.tree:
            tried = drafted.astype(np.int64)  # a tree is one draft that gives as many tokens as were accepted
        slots = outcome.slots[drafted]
        self.accepted[slots] = FORGET * self.accepted[slots] + outcome.accepted[drafted]
        self.drafted[slots] = FORGET * self.drafted[slots] + tried[drafted]
        self.overall = 0.99 * self.overall + (outcome.accepted.sum(), tried.sum())
        if outcome.decode_only:
            cost.add((int(outcome.drafted.sum()) + outcome.proposed) / 2, outcome.seconds, outcome.own)
        if cost.plain.count >= FIRST:
            self._owe(outcome, cost)

    def _owe(self, outcome: DraftOutcome, cost: StepCost) -> None:
        rows, without, (fixed, each) = len(outcome.slots), cost.without.value, cost.line(self.keeps_up)
        drafts = int(outcome.drafted.sum()) + outcome.proposed
        lost = outcome.own
        if outcome.decode_only:
            lost = outcome.seconds - MARGIN * without if drafts else lost + cost.saved
        lost = min(lost, 4 * (fixed + each * drafts))  # more was a disturbance
        self._debt = max(self._debt + lost - MARGIN * without * int(outcome.accepted.sum()) / rows, 0.0)
        if self._debt > LIMIT * without and not self._sleeping:
            self._sleeping = True
            if self.keeps_up:
                self._behind |= self._open

    def _cost(self, rows: int) -> StepCost:
        return self.costs[max(rows, 1).bit_length()]

    def lengths(self, slots: np.ndarray, most: np.ndarray | None = None) -> np.ndarray:
        """Drafts to propose for these slots [n] → int32 [n], 0..width, and up to `most` [n] where it is given
        (`DraftView.host_most`). Call it with all rows that sampled."""
        count = len(slots)
        most = np.full(count, self.width) if most is None else np.minimum(most, self.width)
        if not most.any():
            return np.zeros(count, np.int32)
        cost = self._cost(count)
        cost.off = False
        if cost.plain.count < FIRST:
            return np.zeros(count, np.int32)
        if cost.drafting.count < FIRST:
            cost.asked += 1
            cost.off = cost.asked > 2 * FIRST and not cost.probes(False)
            return np.zeros(count, np.int32) if cost.off else self._some(slots, most)
        chosen = self._best(cost, slots, most)
        on = bool(chosen.any())
        if cost.probes(on):
            return np.zeros(count, np.int32) if on else self._some(slots, most)
        cost.off = not on
        return chosen

    def _some(self, slots: np.ndarray, most: np.ndarray) -> np.ndarray:
        """Drafts for a few rows, other ones each time."""
        self.turn += PROBE_ROWS
        lengths, able = np.zeros(len(slots), np.int32), np.flatnonzero(~self._behind[slots] & (most > 0))
        if able.size:
            chosen = able[(self.turn + np.arange(min(PROBE_ROWS, able.size))) % able.size]
            lengths[chosen] = np.minimum(self.width if self.tree else -(-self.width // 2), most[chosen])
        return lengths

    def _best(self, cost: StepCost, slots: np.ndarray, most: np.ndarray) -> np.ndarray:
        fixed, each = cost.line(self.keeps_up)
        able = ~self._behind[slots] & (most > 0)
        share = np.where(able, self.accepted[slots] / self.drafted[slots], 0.0)
        if self.tree:
            size = np.where(able, most, 0)
            speed, plain = (len(slots) + share.sum()) / (fixed + each * size.sum()), len(slots) / fixed
            return (size * (speed > plain)).astype(np.int32)
        place = np.arange(1, self.width + 1)
        gain = np.minimum(share, 0.995)[:, None] ** place * (place <= most[:, None])  # of each further draft
        taken = np.zeros(gain.shape, bool)
        for _ in range(ROUNDS):
            rate = (len(slots) + gain[taken].sum()) / (fixed + each * taken.sum())
            taken = gain > each * rate
        return taken.sum(1).astype(np.int32)
