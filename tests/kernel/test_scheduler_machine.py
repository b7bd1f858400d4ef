"""The scheduler against a slow twin of plain objects: whatever happens, and in whatever order, every request gets exactly the
tokens that its key says, ends exactly once, and no block, slot or resource is lost, shared wrongly or over-reserved.

The device is the null device with its KV check on: a row that would read foreign or missing KV fails there, so with a prefix
index a block that holds other tokens than those it was matched for, or that was not computed yet."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kernel_prefix_caching.index import HashIndex

from kernel_core.config import EngineConfig
from kernel_core.plan import NO_PREFIX_READ, NO_PREFIX_WRITE, Allocation, Capabilities, Job, KVGroup, SamplingRow
from kernel_core.policy import FirstComeFirstServed
from kernel_core.request import ABORT, ERROR, FINISH_REASONS, LENGTH, STOP, Request
from kernel_core.scheduler import Scheduler
from kernel_core.testing.null import NullExecutor, NullScript, null_tokens
from kernel_core.wire import decode, encode

VOCAB, LENGTH_LIMIT = 40, 48
FULL, WINDOW = KVGroup("full", 4, 1, ("f",)), KVGroup("window", 4, 1, ("w",), window=6)
WHOLE = KVGroup("full", 0, 1, ("r",))
GROUPS = [(FULL,), (FULL, WINDOW), (WINDOW,), (WHOLE,), (FULL, KVGroup("window", 8, 1, ("v",), window=3)), ()]
DEVICES = [
    Capabilities(),
    Capabilities(),
    Capabilities(mixed_lengths=False),
    Capabilities(max_long_rows=1),
    Capabilities(query_lengths=(1, 2, 8)),
]


class ByPriority:
    """Chunks of odd sizes, the latest of the least urgent as victim."""

    def key(self, request):
        return (request.priority,)

    def refresh(self):
        return ()

    def chunk(self, request, remaining, budget):
        return 1 + (request.planned * 7 + request.arrival) % budget

    def victim(self, running):
        return max(running, key=lambda r: (r.priority, r.arrival)).id


class Perverse(FirstComeFirstServed):
    """Always throws out the oldest it may."""

    def victim(self, running):
        return min(running, key=lambda r: r.arrival).id


class Places:
    """A bounded resource that remembers who holds how much."""

    name = "places"

    def __init__(self, size):
        self.size, self.held, self.refused = size, {}, []

    def reserve(self, request_id, want):
        if sum(self.held.values()) + want > self.size:
            self.refused.append(request_id)
            return False
        self.held[request_id] = want
        return True

    def release(self, request_id):
        self.held.pop(request_id, None)


class Store:
    """A connector and its worker part: what was evicted is kept for good, under its key."""

    name = "store"

    def __init__(self, groups):
        self.size, self.content, self.known = groups[0].block_size, [{} for _ in groups], set()
        self.unsaved, self.jobs, self.loaded = [], 0, 0

    def evicted(self, group, ids, keys):
        self.unsaved += [(group, block, key) for block, key in zip(ids.tolist(), keys)]

    def job(self, *what):
        self.jobs += 1
        return Job("store", str(self.jobs), encode(what))

    def saves(self):
        saves, self.unsaved = self.unsaved, []
        return [self.job("save", saves)] if saves else []

    def find(self, keys):
        stored = (all(key in content for content in self.content) for key in keys)
        return next((i for i, there in enumerate(stored) if not there), len(keys))

    def load(self, keys, ids):
        self.loaded += len(keys)
        return self.job("load", [(g, b, key) for g, blocks in enumerate(ids) for b, key in zip(blocks.tolist(), keys)])

    def done(self, ack):
        self.known.add(ack.key)

    def work(self, kv, data):
        what, blocks = decode(data, tuple[str, list[tuple[int, int, bytes]]])
        for group, block, key in blocks:
            place = slice(block * self.size, (block + 1) * self.size)
            if what == "save":
                self.content[group][key] = kv[group][place].copy()
            else:
                kv[group][place] = self.content[group][key]


@dataclass
class Twin:
    """What the test knows of a request."""

    request: Request
    gates: set = field(default_factory=set)
    fails_at: int | None = None
    doomed: bool = False  # a gate failed
    got: list = field(default_factory=list)
    finish: int = 0
    slot: int = -1
    held_by_family: bool = False
    admitted_since_refusal: int | None = None

    def expected(self):
        """All tokens it will ever get, and how it then ends."""
        r, tokens = self.request, []
        for token in null_tokens(r.key, np.arange(r.token_ids.size, r.max_len), VOCAB).tolist():
            tokens.append(token)
            if token in r.stop_ids:
                return tokens, STOP
        return tokens, LENGTH


class SchedulerMachine(RuleBasedStateMachine):
    with_index, with_store = False, False

    @initialize(data=st.data())
    def start(self, data):
        draw = data.draw
        groups = draw(st.sampled_from(GROUPS))
        self.depth = draw(st.integers(1, 3))
        self.budget = draw(st.sampled_from([7, 7, 8, 30]))
        self.chunk = draw(st.sampled_from([None, None, 5]))
        self.width = draw(st.sampled_from([0, 0, 1, 3]))
        ahead = draw(st.sampled_from([0, self.width, self.width + 2])) if self.width else 0
        lookback = draw(st.sampled_from([0, 1, 3])) if self.width else 0
        self.device = draw(st.sampled_from(DEVICES))
        self.policy = draw(st.sampled_from([FirstComeFirstServed, FirstComeFirstServed, ByPriority, Perverse]))()
        self.passes = draw(st.sampled_from([1, 3, 64]))
        slots = draw(st.sampled_from([6, 4, 2, 1]))
        blocks = []
        for group in groups:
            size = group.block_size or LENGTH_LIMIT
            least = -(-(LENGTH_LIMIT + (ahead if group.block_size else 0)) // size) + 1
            if group.kind == "window":
                least = min(least, -(-(group.window + lookback - 1 + 1 + self.width + ahead) // size) + 2)
            blocks.append(least + draw(st.integers(0, 30 if group.block_size else 2)))
        allocation = Allocation(tuple(blocks), slots, LENGTH_LIMIT, self.budget, self.width, ahead, lookback)
        ragged = draw(st.sampled_from([0, 1, 5]))
        self.script = NullScript(
            accept=lambda key, p: (key + p * ragged) % 4,
            drafts=draw(st.sampled_from([None, lambda key, known: (key + known) % 3])),
            fail={},
            lose={},
            ack_after=draw(st.integers(0, 2)),
        )
        self.waiting = np.zeros(slots, np.int32)  # drafts that the last committed step reported, by slot
        rules = (groups, VOCAB, LENGTH_LIMIT, self.width, self.device, self.script)
        self.executor = NullExecutor(*rules, check_kv=True, draft_ahead=ahead, lookback=lookback)
        self.executor.allocate(allocation)
        self.places = Places(3)
        config = EngineConfig(max_tokens_per_step=self.budget, max_prompt_chunk=self.chunk, policy_passes=self.passes)
        same_size = {g.block_size for g in groups} == {4}
        self.index = HashIndex(groups, blocks) if self.with_index and same_size else None
        parts = (self.device, self.policy, [self.places], self.depth)
        self.store = Store(groups) if self.with_store and self.index is not None else None
        if self.store is not None:
            self.script.worker_parts = {"store": self.store.work}
            self.script.bad_jobs = draw(st.sampled_from([frozenset(), frozenset({"2", "5", "6"})]))
        self.scheduler = Scheduler(config, groups, allocation, *parts, prefix_index=self.index, connector=self.store)
        self.capacity = tuple(n - 1 for n in blocks)
        self.slots = slots
        self.twins: dict[str, Twin] = {}
        self.flying: deque = deque()
        self.by_slot: dict[int, Twin] = {}
        self.jobs = set()

    # ---- events

    def live(self):
        return [t for t in self.twins.values() if not t.finish]

    @rule(
        prompt=st.integers(1, 30),
        life=st.integers(1, 17),
        stops=st.frozensets(st.integers(0, VOCAB - 1), max_size=2),
        extra=st.sampled_from(
            ["", "", "", "gate", "place", "places", "family", "family", "job", "fail", "lose", "salt", "alone"]
        ),
        alike=st.integers(0, 2),
        priority=st.integers(0, 2),
        count=st.sampled_from([1, 1, 2, 4]),
    )
    def add(self, prompt, life, stops, extra, priority, count, alike):
        for _ in range(count):
            self.add_one(prompt, life, stops, extra, priority, alike)

    def add_one(self, prompt, life, stops, extra, priority, alike):
        number = len(self.twins)
        name = f"r{number}"
        tokens = (np.arange(prompt, dtype=np.int32) * 3 + (0 if extra == "family" else number)) % VOCAB
        if self.with_index:
            tokens = np.arange(prompt, dtype=np.int32)
            tokens[alike * 6 :] += number % 3  # prefixes of many lengths in common
        if extra == "family":
            tokens = (np.arange(13, dtype=np.int32) * 5) % VOCAB
            prompt = 13
        request = Request(name, tokens, SamplingRow(), number * 77, prompt + life, stops, priority)
        twin = self.twins[name] = Twin(request)
        if extra == "salt":
            request.identity, request.payloads = b"salt", {"identity": b"salt"}
        elif extra == "alone":
            request.flags = (NO_PREFIX_READ, NO_PREFIX_WRITE, NO_PREFIX_READ | NO_PREFIX_WRITE)[number % 3]
        if extra == "gate":
            request.gates, twin.gates = ("ready", "set"), {"ready", "set"}
        elif extra in ("place", "places"):
            request.resources = {"places": 1 if extra == "place" else 3}
        elif extra == "family":
            request.family = "family"
        elif extra == "job":
            request.jobs, request.gates = (Job("plugin", name, b""),), (f"plugin:{name}",)
            twin.gates = {f"plugin:{name}"}
        elif extra == "fail":
            twin.fails_at = self.script.fail[name] = prompt + life // 2
        elif extra == "lose":
            self.script.lose[name] = prompt + life // 2
        self.scheduler.add(request)

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def abort(self, data):
        twin = data.draw(st.sampled_from(self.live()))
        self.scheduler.abort([twin.request.id, "nobody"])
        twin.finish = -ABORT  # its code is still to come

    @precondition(lambda self: any(t.gates & {"ready", "set"} for t in self.live()))
    @rule(data=st.data(), error=st.sampled_from([None, None, None, "no grammar"]))
    def open_gate(self, data, error):
        twin = data.draw(st.sampled_from([t for t in self.live() if t.gates & {"ready", "set"}]))
        gate = sorted(twin.gates)[0]
        self.scheduler.open_gate(twin.request.id, gate, error)
        twin.gates.discard(gate)
        if error:
            twin.finish = -ERROR

    @precondition(lambda self: self.index is not None)
    @rule()
    def reset(self):
        self.scheduler.reset_cache()
        assert not any(self.index.held(g).size for g in range(len(self.scheduler.kv.groups)))

    @precondition(lambda self: len(self.flying) < self.depth)
    @rule()
    def plan(self):
        self.places.refused.clear()
        plan = self.scheduler.plan()
        self.flying.append((plan, self.executor.submit(plan)))
        self.check_plan(plan)

    @precondition(lambda self: self.flying)
    @rule()
    def commit(self):
        plan, handle = self.flying.popleft()
        result = handle.result()
        for ack in result.acks:
            if ack.plugin == "plugin":
                self.twins[ack.key].gates.discard(f"{ack.plugin}:{ack.key}")
        live = [i for i, slot in enumerate(plan.rows.tolist()) if self.scheduler.slots.since[slot] <= plan.plan_id]
        updates = self.scheduler.commit(plan, result)
        self.waiting[plan.rows[live]] = result.drafts[live]
        self.check_updates(updates)

    # ---- promises

    def check_plan(self, plan):
        q, room = plan.q, plan.room
        assert q.sum() <= self.budget and plan.rows.size <= self.slots
        assert room.max(initial=0) <= 1 + self.width
        if self.chunk:
            assert (q[room == 0] <= self.chunk).all()
        if not self.device.mixed_lengths:
            assert np.unique(q).size <= 1
        if self.device.max_long_rows:
            assert (q > 1).sum() <= self.device.max_long_rows
        if self.device.query_lengths:
            assert set(q.tolist()) <= set(self.device.query_lengths)
        for slot in plan.closed.tolist():
            self.by_slot.pop(slot).slot = -1
        self.waiting[[opened.slot for opened in plan.opened]] = 0
        assert (room <= 1 + self.waiting[plan.rows]).all(), "room for drafts that nobody reported"
        for opened in plan.opened:
            assert opened.slot not in self.by_slot and opened.slot not in plan.closed
            twin = self.by_slot[opened.slot] = self.twins[opened.request_id]
            assert not twin.gates and not twin.finish, "admitted too early or too late"
            assert opened.token_ids.tolist() == twin.request.token_ids.tolist() + twin.got, "a readmitted request lost tokens"
            twin.slot = opened.slot
        self.check_order([self.twins[o.request_id] for o in plan.opened])

    def check_order(self, opened):
        """Nobody who asks for no resource waits behind somebody whom the policy puts later."""
        key = (
            (lambda t: (t.request.priority, t.request.arrival))
            if isinstance(self.policy, ByPriority)
            else lambda t: t.request.arrival
        )
        in_order = [t for t in opened if not t.request.resources]
        assert in_order == sorted(in_order, key=key)
        flying = {int(s) for plan, _ in self.flying for s in plan.rows}
        for twin in self.live():
            plain = not (twin.gates or twin.request.resources or twin.request.family) and twin.slot < 0 and not twin.got
            plain = plain and not (self.index and self.scheduler._entries[twin.request.id].closed_gates)
            if plain and not flying and in_order:
                assert key(twin) > key(in_order[-1]), f"{twin.request.id} was passed over"
        for twin in self.twins.values():
            if twin.request.id in self.places.refused and twin.admitted_since_refusal is None:
                twin.admitted_since_refusal = 0
        for twin in opened:
            twin.admitted_since_refusal = None
        waits = [t for t in self.live() if t.admitted_since_refusal is not None]
        for twin in waits:
            twin.admitted_since_refusal += len(opened)
        if waits:  # whoever was refused first gets its turn after that many others, plus those of the plan that refused it
            longest = max(waits, key=lambda t: t.admitted_since_refusal)
            assert longest.admitted_since_refusal <= self.passes + 2 * self.slots, "starved"

    def check_updates(self, updates):
        assert len(set(updates.requests)) == len(updates.requests)
        assert updates.offsets.size == len(updates.requests) + 1 and updates.offsets[-1] == updates.tokens.size
        for i, name in enumerate(updates.requests):
            twin = self.twins[name]
            assert twin.finish <= 0, f"{name} was heard of after its end"
            new = updates.tokens[updates.offsets[i] : updates.offsets[i + 1]].tolist()
            expected, code = twin.expected()
            assert expected[len(twin.got) : len(twin.got) + len(new)] == new
            twin.got += new
            finish = int(updates.finish[i])
            if not finish:
                assert new and len(twin.got) < len(expected) and not twin.finish
                continue
            if twin.finish:
                assert finish == -twin.finish
            elif finish == ERROR:
                assert twin.fails_at is not None and "finite" in updates.errors[name]
                assert len(twin.got) + twin.request.token_ids.size >= twin.fails_at
            else:
                assert finish == code and twin.got == expected, FINISH_REASONS[finish]
                assert updates.stop_token[i] == (expected[-1] if code == STOP else -1)
            twin.finish = finish

    @invariant()
    def nothing_is_lost(self):
        self.scheduler.check()
        assert sum(self.places.held.values()) <= self.places.size
        running = {t.request.id for t in self.twins.values() if t.finish == 0 and t.request.resources}
        assert set(self.places.held) <= running | {t.request.id for t in self.live()}

    def teardown(self):
        if not hasattr(self, "twins"):
            return
        for twin in self.live():
            for gate in twin.gates & {"ready", "set"}:
                self.scheduler.open_gate(twin.request.id, gate)
            twin.gates -= {"ready", "set"}
        for _ in range(200 + 200 * len(self.twins)):
            if not self.scheduler.plannable() and not self.flying:
                break
            if len(self.flying) < self.depth and self.scheduler.plannable():
                self.plan()
            else:
                self.commit()
            self.nothing_is_lost()
        assert not self.scheduler.prefixes.fetching
        self.check_updates(self.scheduler.updates())
        assert all(t.finish > 0 for t in self.twins.values()), "a request never ended"
        assert self.scheduler.unfinished == 0 and not self.places.held
        self.scheduler.kv.reclaim(self.scheduler.slots.last_plan)
        assert self.scheduler.free_blocks == self.capacity
        assert sorted(r for r, *_ in self.scheduler.finished) == sorted(self.twins)


class IndexedMachine(SchedulerMachine):
    with_index = True


class StoringMachine(IndexedMachine):
    with_store = True


QUICK = settings(
    max_examples=30, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestScheduler, TestSchedulerWithIndex = SchedulerMachine.TestCase, IndexedMachine.TestCase
TestSchedulerWithStore = StoringMachine.TestCase
TestScheduler.settings = TestSchedulerWithIndex.settings = TestSchedulerWithStore.settings = QUICK
