"""Order is the policy's, asked when it matters; the kernel keeps the heap."""

import numpy as np

from kernel_core.config import EngineConfig
from kernel_core.plan import Allocation, Capabilities, KVGroup, SamplingRow
from kernel_core.policy import FirstComeFirstServed, combined
from kernel_core.protocols import Policy, RequestView
from kernel_core.request import Request
from kernel_core.scheduler import Scheduler
from kernel_core.testing.null import NullExecutor
from kernel_core.waiting import Entry

GROUPS = (KVGroup("full", 4, 1, ("f",)),)


class Shortest(FirstComeFirstServed):
    """Shortest prompt first, until `moved` names requests that go to the front; half chunks; records what it is asked."""

    def __init__(self):
        self.front, self.moved, self.keys, self.views = set(), [], [], []

    def key(self, request):
        self.keys.append(request.id)
        return (request.id not in self.front, request.num_prompt)

    def refresh(self):
        moved, self.moved = self.moved, []
        return moved

    def chunk(self, request, remaining, budget):
        self.views.append(request)
        return min(max(remaining // 2, 1), budget)


def engine(policy, blocks=60, slots=1, budget=64, **rest):
    allocation = Allocation((blocks,), slots, 40, budget)
    executor = NullExecutor(GROUPS, 100, 40)
    executor.allocate(allocation)
    config = EngineConfig(max_tokens_per_step=budget)
    return Scheduler(config, GROUPS, allocation, Capabilities(), policy, **rest), executor


def request(name, prompt, new=2, **rest):
    return Request(name, np.arange(prompt, dtype=np.int32), SamplingRow(), 0, prompt + new, **rest)


def drive(scheduler, executor):
    order = []
    while scheduler.plannable():
        plan = scheduler.plan()
        order += [o.request_id for o in plan.opened]
        scheduler.commit(plan, executor.submit(plan).result())
    return order


def test_fcfs_is_a_policy_in_order_of_arrival():
    assert isinstance(FirstComeFirstServed(), Policy)
    scheduler, executor = engine(None)
    for name in "cab":
        scheduler.add(request(name, 5))
    assert drive(scheduler, executor) == ["c", "a", "b"]


def test_fcfs_preempts_the_latest():
    views = [RequestView(n, a, 0, 1, 1, 0, 0, 0, None) for n, a in (("x", 2), ("y", 9), ("z", 5))]
    assert FirstComeFirstServed().victim(views) == "y"


def test_keys_order_admission_with_arrival_breaking_ties():
    scheduler, executor = engine(Shortest())
    for name, prompt in (("a", 9), ("b", 3), ("c", 6), ("d", 3)):
        scheduler.add(request(name, prompt))
    assert drive(scheduler, executor) == ["b", "d", "c", "a"]


def test_keys_are_asked_on_arrival_preemption_and_refresh_only():
    policy = Shortest()
    scheduler, executor = engine(policy)
    for name, prompt in (("a", 4), ("b", 5), ("c", 6)):
        scheduler.add(request(name, prompt, 9))
    for _ in range(4):
        plan = scheduler.plan()
        scheduler.commit(plan, executor.submit(plan).result())
    assert policy.keys == ["a", "b", "c"]
    policy.front, policy.moved = {"c"}, ["c", "a", "ended long ago"]
    plan = scheduler.plan()
    scheduler.commit(plan, executor.submit(plan).result())
    assert policy.keys == ["a", "b", "c", "c"]  # "a" is running
    scheduler.preempt(scheduler.slots.entries[0])
    assert policy.keys == ["a", "b", "c", "c", "a"]
    assert drive(scheduler, executor) == ["c", "a", "b"]


def test_the_policy_sizes_chunks_and_sees_its_payload():
    policy = Shortest()
    scheduler, executor = engine(policy, policy_plugin="shortest")
    scheduler.add(request("a", 12, payloads={"shortest": b"x", "other": b"y"}, priority=3))
    sizes = []
    while scheduler.plannable() and len(sizes) < 4:
        plan = scheduler.plan()
        sizes.append(plan.q.tolist())
        scheduler.commit(plan, executor.submit(plan).result())
    assert sizes == [[6], [3], [1], [1]]
    assert policy.views[1] == RequestView("a", 1, 3, 12, 12, 6, 6, 0, b"x")


def test_a_policy_that_always_throws_out_the_oldest_cannot_stop_progress():
    class Perverse(FirstComeFirstServed):
        def victim(self, running):
            return min(running, key=lambda r: r.arrival).id

    scheduler, executor = engine(Perverse(), blocks=12, slots=4)
    for name in "abcd":
        scheduler.add(request(name, 8, 28))
    drive(scheduler, executor)
    assert scheduler.preemptions > 0 and scheduler.finished[0][0] == "a"
    assert sorted(f[0] for f in scheduler.finished) == list("abcd")


class Loud(FirstComeFirstServed):
    """By its payload; the earliest is preempted."""

    def key(self, request):
        return (request.payload,)

    def refresh(self):
        return ["b"]

    def victim(self, running):
        return min(running, key=lambda r: (r.payload, r.arrival)).id


def test_of_several_policies_the_next_orders_who_is_equal_for_the_one_before():
    shortest, payloads = Shortest(), {"a": b"2", "b": b"1", "c": b"1", "d": b"1"}
    scheduler, executor = engine(combined([("loud", Loud()), ("shortest", shortest)]))
    for (name, loud), prompt in zip(payloads.items(), (4, 9, 5, 6)):
        scheduler.add(request(name, prompt, payloads={"loud": loud, "shortest": b"own"}))
    assert drive(scheduler, executor) == ["c", "d", "b", "a"]
    assert {view.payload for view in shortest.views} == {b"own"}
    shortest.moved = ["b", "c"]
    assert list(scheduler.policy.refresh()) == ["b", "c"]
    views = [
        scheduler.view(Entry(request(n, 9, payloads={"loud": p}), i, np.zeros(9), set()))
        for i, (n, p) in enumerate(payloads.items())
    ]
    assert scheduler.policy.victim(views) == "b" and scheduler.policy.chunk(views[0], 9, 8) == 4
    assert combined([]) is None and combined([("shortest", shortest)]) is shortest
