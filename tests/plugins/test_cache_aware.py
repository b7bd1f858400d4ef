"""The cache-aware policy: what is cached goes first, and nobody is served after more than a window of later arrivals."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cache_aware.policy import CacheAwarePolicy
from kernel_prefix_caching.index import HashIndex

from kernel_core.config import EngineConfig
from kernel_core.plan import Allocation, Capabilities, KVGroup, SamplingRow
from kernel_core.protocols import Policy
from kernel_core.request import Request
from kernel_core.scheduler import Scheduler
from kernel_core.testing.null import NullExecutor

GROUPS = (KVGroup("full", 4, 1, ("f",)),)


class Engine:
    """One slot at a time, so that the order of service is the policy's."""

    def __init__(self, policy, index=True, blocks=40):
        allocation = Allocation((blocks,), 1, 40, 64)
        self.executor = NullExecutor(GROUPS, 100, 40, check_kv=True)
        self.executor.allocate(allocation)
        found = HashIndex(GROUPS, (blocks,)) if index else None
        config = EngineConfig(max_tokens_per_step=64)
        self.scheduler = Scheduler(config, GROUPS, allocation, Capabilities(), policy, prefix_index=found)
        self.order, self.count = [], 0

    def add(self, prompt, new=2):
        self.count += 1
        self.scheduler.add(Request(str(self.count), np.array(prompt, np.int32), SamplingRow(), self.count, len(prompt) + new))

    def step(self):
        plan = self.scheduler.plan()
        self.order += [int(opened.request_id) for opened in plan.opened]
        self.scheduler.commit(plan, self.executor.submit(plan).result())
        self.scheduler.check()

    def run(self):
        while self.scheduler.plannable():
            self.step()
        return self.order


WARM, COLD = list(range(20)), list(range(50, 70))


def test_cached_prompts_go_first_and_others_by_arrival():
    engine = Engine(CacheAwarePolicy(64, 32))
    assert isinstance(engine.scheduler.policy, Policy)
    engine.add(WARM)
    engine.run()
    for prompt in (COLD, [*COLD[:-1], 1], WARM[:18], WARM):
        engine.add(prompt)
    assert engine.run() == [1, 4, 5, 2, 3]  # 17 of 18 and 19 of 20: the whole window both, so by arrival


def test_prompts_that_become_cached_while_they_wait_move_up():
    engine = Engine(CacheAwarePolicy(64, 32))
    for prompt in (WARM, COLD, [*WARM, 3], [*COLD, 3]):
        engine.add(prompt)
    assert engine.run() == [1, 3, 2, 4]


def test_without_an_index_it_is_first_come_first_served():
    engine = Engine(CacheAwarePolicy(64, 32), index=False)
    for prompt in (WARM, COLD, WARM):
        engine.add(prompt)
    assert engine.run() == [1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(0, 3)), min_size=1, max_size=40),
    window=st.integers(0, 6),
    refresh=st.integers(1, 5),
)
def test_nobody_is_overtaken_by_more_than_a_window_of_later_arrivals(arrivals, window, refresh):
    """Arrivals in any rhythm, of prompts with prefixes in common or not."""
    engine = Engine(CacheAwarePolicy(window, refresh))
    for kind, length, steps in arrivals:
        engine.add([(kind % 2) * 50 + i for i in range(length)])
        for _ in range(steps):
            engine.step()
    order = engine.run()
    assert sorted(order) == list(range(1, len(arrivals) + 1))
    for place, number in enumerate(order):
        later = [other for other in order[:place] if other > number]
        assert len(later) <= window and all(other <= number + window for other in later)


def test_requests_that_are_gone_are_forgotten():
    engine = Engine(CacheAwarePolicy(8, 2))
    for _ in range(6):
        engine.add(COLD)
    engine.scheduler.abort([str(number) for number in range(2, 7)])
    engine.run()
    for _ in range(8):
        engine.scheduler.policy.refresh()
    assert not engine.scheduler.policy._waiting
