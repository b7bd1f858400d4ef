"""Blocks are counted right whatever happens to them: a pool and its tables against a twin made of sets and lists."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kernel_core.blocks import BlockPool, KVBlocks
from kernel_core.errors import CapacityError
from kernel_core.plan import Allocation, KVGroup

SLOTS, LENGTH = 4, 40
FULL, WINDOW = KVGroup("full", 4, 1, ("f",)), KVGroup("window", 3, 1, ("w",), window=5)


def blocks(*groups: KVGroup, num: int = 30, width: int = 0) -> KVBlocks:
    return KVBlocks(groups, Allocation((num,) * len(groups), SLOTS, LENGTH, 64, width))


class BlocksMachine(RuleBasedStateMachine):
    """The twin: each slot's blocks as {column: id} per group, each plan's blocks until it is committed."""

    @initialize(num=st.integers(20, 40))
    def start(self, num):
        self.kv, self.num = blocks(FULL, WINDOW, num=num), num
        self.ends, self.done = [0] * SLOTS, [0] * SLOTS
        self.tables = [[{} for _ in range(SLOTS)] for _ in self.kv.groups]
        self.handles = []
        self.made = self.committed = 0
        self.named = {}  # plan → per group, blocks that it may touch
        self.closing = set()  # slots that the next plan closes; free after it

    @rule(slots=st.sets(st.integers(0, SLOTS - 1), min_size=1), more=st.integers(1, 9))
    def plan(self, slots, more):
        self.make(sorted(slots - self.closing), more)

    def make(self, slots, more):
        rows = np.array(slots, np.intp)
        ends = np.minimum(np.array([self.ends[s] for s in rows], np.int32) + more, LENGTH)
        if (self.kv.needs(rows, ends).sum(1) > self.kv.free()).any():
            return
        updates = self.kv.extend(rows, ends)
        self.closing = set()
        self.made += 1
        busy = [set().union(*(ids[g] for ids in self.named.values()), *self.owned(g)) for g in range(2)]
        for g, update in enumerate(updates):
            for slot, column, block in zip(update.slots.tolist(), update.columns.tolist(), update.ids.tolist()):
                if self.tables[g][slot].get(column) == block:
                    continue  # adopted
                if block:
                    assert block not in busy[g] and 0 < block < self.num, "a block in use was handed out"
                    self.tables[g][slot][column] = block
                else:
                    assert (column + 1) * self.kv.groups[g].block_size <= self.done[slot] - 5 + 1, "it is still in the window"
        for slot, end in zip(rows.tolist(), ends.tolist()):
            self.ends[slot] = end
            for g, group in enumerate(self.kv.groups):
                first = 0 if g == 0 else max(self.done[slot] - 5 + 1, 0) // group.block_size
                assert set(range(first, -(-end // group.block_size))) <= set(self.tables[g][slot]), "a position has no block"
        self.named[self.made] = [set().union(*self.owned(g)) for g in range(2)]

    def owned(self, g):
        return [set(table.values()) for table in self.tables[g]] + [set(h.ids[g].tolist()) for h in self.handles]

    @precondition(lambda self: self.committed < self.made)
    @rule(data=st.data())
    def commit(self, data):
        self.committed += 1
        rows = np.arange(SLOTS)
        self.done = [data.draw(st.integers(self.done[s], self.ends[s])) for s in range(SLOTS)]
        self.kv.commit(rows, np.array(self.done), self.made)
        for table, done in zip(self.tables[1], self.done):
            for column in [c for c in table if (c + 1) * 3 <= done - 5 + 1]:
                del table[column]
        self.kv.reclaim(self.committed)
        self.named.pop(self.committed, None)

    @rule(slot=st.integers(0, SLOTS - 1))
    def close(self, slot):
        self.kv.close(slot, self.made)
        self.closing.add(slot)
        self.kv.reclaim(self.committed)
        for tables in self.tables:
            tables[slot] = {}
        self.ends[slot] = self.done[slot] = 0

    @rule(slot=st.integers(0, SLOTS - 1))
    def hold(self, slot):
        if self.done[slot]:
            self.handles.append(self.kv.hold(slot, self.done[slot], "somebody", deadline=self.made + 3))

    @rule(slot=st.integers(0, SLOTS - 1), which=st.integers(0, 9))
    def adopt(self, slot, which):
        if self.handles and not self.ends[slot] and slot not in self.closing and min(self.kv.free()) > 0:
            handle = self.handles[which % len(self.handles)]
            self.kv.adopt(slot, handle)
            for g, group in enumerate(self.kv.groups):
                full = handle.tokens // group.block_size - handle.first[g]
                shared = dict(enumerate(handle.ids[g][: max(full, 0)].tolist(), handle.first[g]))
                self.tables[g][slot] = shared
            self.ends[slot] = self.done[slot] = handle.tokens
            self.make([slot], 0)

    @rule(which=st.integers(0, 9))
    def drop(self, which):
        if self.handles:
            handle = self.handles.pop(which % len(self.handles))
            self.kv.drop(handle, self.made)
            self.kv.drop(handle, self.made)  # idempotent
            self.kv.reclaim(self.committed)

    @rule()
    def expire(self):
        overdue = {id(h) for h in self.handles if h.deadline < self.made}
        assert {id(h) for h in self.kv.expire(self.made, self.made)} == overdue
        self.handles = [h for h in self.handles if id(h) not in overdue]
        self.kv.reclaim(self.committed)

    @invariant()
    def counts_are_right(self):
        self.kv.check()
        for g, group in enumerate(self.kv.groups):
            used = Counter(block for owner in self.owned(g) for block in owner)
            assert {b: int(group.pool.refs[b]) for b in used} == dict(used)
            assert group.pool.free + group.pool.deferred == self.num - 1 - len(used)
            named = set().union(*(ids[g] for ids in self.named.values()))
            assert group.pool.free <= self.num - 1 - len(used.keys() | named), "a block that a plan in flight names is free"
            for slot, done in enumerate(self.done):
                for column, block in self.tables[g][slot].items():
                    ready = (column + 1) * group.block_size <= done
                    assert group.pool.ready[block] or not ready


TestBlocks = BlocksMachine.TestCase
TestBlocks.settings = settings(max_examples=40, stateful_step_count=30, deadline=None, derandomize=True)


def test_lowest_blocks_first_and_never_the_null_block():
    pool = BlockPool(5)
    assert pool.take(4).tolist() == [1, 2, 3, 4]
    with pytest.raises(CapacityError, match="1 KV blocks wanted, 0 free"):
        pool.take(1)


def test_a_block_waits_for_the_last_plan_that_names_it():
    pool = BlockPool(3)
    ids = pool.take(2)
    pool.release(ids[:1], after=1)
    pool.release(ids[1:], after=2)
    assert (pool.free, pool.deferred) == (0, 2)
    pool.reclaim(1)
    assert (pool.free, pool.deferred) == (1, 1)
    pool.reclaim(2)
    assert (pool.free, pool.deferred) == (2, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool, ids: pool.refs.__setitem__(ids[0], 2), "counted"),
        (lambda pool, ids: setattr(pool, "free", pool.free - 1), "lost"),
        (lambda pool, ids: pool._stack.__setitem__(0, pool._stack[1]), "free twice"),
        (lambda pool, ids: pool._stack.__setitem__(0, 0), "null block"),
        (lambda pool, ids: pool._stack.__setitem__(0, ids[0]), "held"),
    ],
)
def test_check_finds_damage(damage, message):
    pool = BlockPool(8)
    ids, held = pool.take(3), np.zeros(8, np.int32)
    held[ids] = 1
    pool.check(held)
    damage(pool, ids)
    with pytest.raises(AssertionError, match=message):
        pool.check(held)


def test_window_group_gives_back_what_no_query_sees():
    kv = blocks(WINDOW)
    row = np.array([2])
    kv.extend(row, np.array([12]))
    assert kv.free() == (25,)
    kv.commit(row, np.array([7]), after=1)  # the next query, position 7, sees 3 to 7: block 0 (positions 0-2) is behind it
    kv.reclaim(1)
    assert kv.free() == (26,)
    (update,) = kv.extend(row, np.array([12]))
    assert (update.slots.tolist(), update.columns.tolist(), update.ids.tolist()) == ([2], [0], [0])
    kv.commit(row, np.array([8]), after=1)
    assert kv.free() == (26,)
    kv.commit(row, np.array([10]), after=1)
    kv.reclaim(1)
    assert kv.free() == (27,)


def test_blocks_are_ready_when_their_last_position_is_committed():
    kv = blocks(FULL)
    row = np.array([0])
    kv.extend(row, np.array([9]))
    ids = kv.groups[0].table[0, :3].copy()
    kv.commit(row, np.array([7]), 1)
    assert kv.groups[0].pool.ready[ids].tolist() == [True, False, False]
    kv.commit(row, np.array([9]), 1)
    assert kv.groups[0].pool.ready[ids].tolist() == [True, True, False]


def test_a_partial_block_is_copied_token_by_token():
    kv = blocks(FULL)
    row = np.array([0])
    kv.extend(row, np.array([6]))
    kv.commit(row, np.array([6]), 1)
    handle = kv.hold(0, 6)
    kv.adopt(1, handle)
    kv.extend(np.array([1]), np.array([6]))
    table = kv.groups[0].table
    assert table[1, 0] == table[0, 0] and table[1, 1] != table[0, 1]
    (copies,) = kv.copies([(1, handle)])
    assert copies.src.tolist() == [table[0, 1] * 4, table[0, 1] * 4 + 1]
    assert copies.dst.tolist() == [table[1, 1] * 4, table[1, 1] * 4 + 1]


def test_one_block_can_hold_a_whole_request():
    kv = blocks(KVGroup("full", 0, 1, ("r",)), num=3)
    kv.extend(np.array([0, 1]), np.array([1, LENGTH]))
    assert kv.free() == (0,)
    assert kv.extend(np.array([0]), np.array([LENGTH]))[0].ids.size == 0


def test_groups_and_sizes_must_agree():
    with pytest.raises(CapacityError, match="2 KV groups"):
        KVBlocks((FULL, WINDOW), Allocation((4,), 1, 8, 8))
