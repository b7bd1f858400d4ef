"""The priority plugin: lower numbers first, ties by arrival, the least urgent preempted first."""

import subprocess
import sys

import kernel_priority
import numpy as np

from kernel_core.config import EngineConfig
from kernel_core.plan import Allocation, Capabilities, KVGroup, SamplingRow
from kernel_core.protocols import Policy
from kernel_core.request import Request
from kernel_core.scheduler import Scheduler
from kernel_core.testing.null import NullExecutor

GROUPS = (KVGroup("full", 4, 1, ("f",)),)


def drive(blocks, slots, requests):
    """→ (order of opening, scheduler, order of closing of those that were preempted)."""
    allocation = Allocation((blocks,), slots, 40, 64)
    executor = NullExecutor(GROUPS, 100, 40)
    executor.allocate(allocation)
    policy = kernel_priority.make_policy(None)
    assert isinstance(policy, Policy)
    scheduler = Scheduler(EngineConfig(max_tokens_per_step=64), GROUPS, allocation, Capabilities(), policy)
    for name, priority, new in requests:
        scheduler.add(Request(name, np.arange(8, dtype=np.int32), SamplingRow(), 0, 8 + new, priority=priority))
    opened = []
    while scheduler.plannable():
        plan = scheduler.plan()
        opened += [o.request_id for o in plan.opened]
        scheduler.commit(plan, executor.submit(plan).result())
    return opened, scheduler


def test_lower_is_sooner_and_ties_go_by_arrival():
    opened, _ = drive(40, 1, [("a", 0, 2), ("b", 5, 2), ("c", -1, 2), ("d", 0, 2)])
    assert opened == ["c", "a", "d", "b"]


def test_the_least_urgent_is_preempted_though_it_came_first():
    opened, scheduler = drive(12, 3, [("bulk", 9, 20), ("urgent", 0, 20)])
    assert opened[:2] == ["urgent", "bulk"] and opened[2:] == ["bulk"] * scheduler.preemptions and scheduler.preemptions
    assert [f[0] for f in scheduler.finished] == ["urgent", "bulk"]


def test_the_entry_point_is_light():
    code = "import sys, kernel_priority; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
