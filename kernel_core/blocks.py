"""KV blocks: a pool per group, a block table per slot, and the rules of who may use a block and when.

A block is *taken* from the pool, referenced by tables and handles, and becomes reusable when nobody references it any more
and the last plan that names it is committed. It is *planned* until the KV of all its positions is committed, then *ready*.
Columns of a table are positions divided by the block size. Block 0 of every group is the null block: never handed out,
never written, and what a table holds where a sliding window has given its block back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from kernel_core.errors import CapacityError, PluginError
from kernel_core.plan import Allocation, BlockUpdate, Copies, KVGroup
from kernel_core.protocols import PrefixIndex

NOTHING = BlockUpdate()
_FAR = np.iinfo(np.int32).max


class BlockPool:
    """The blocks of one group: reference counts, ready marks, a stack of unused ids, and ids that wait for a plan's commit.

    With a prefix index, `kept` blocks are in it. A kept block that nobody refers to is *idle*: it stays as it is until
    somebody shares it, or until the pool needs it and the index evicts it. So idle blocks count as free."""

    def __init__(self, num_blocks: int, group: int = 0, index: PrefixIndex | None = None) -> None:
        self.refs = np.zeros(num_blocks, np.int32)
        self.ready = np.zeros(num_blocks, np.bool_)
        self.kept = np.zeros(num_blocks, np.bool_)
        self.capacity = num_blocks - 1
        self.free = num_blocks - 1  # blocks that can be taken now, idle ones included
        self.idle = 0
        self.deferred = 0  # blocks that nobody holds but a plan in flight names
        self.group, self.index = group, index
        self.evicted: Callable[[int, np.ndarray, Sequence[bytes]], None] | None = None  # hears of blocks about to be overwritten
        self._shares = 0  # references beyond a block's first
        self._stack = np.arange(num_blocks - 1, 0, -1, dtype=np.int32)  # the top, at index free - idle - 1, is taken first
        self._waiting: deque[tuple[int, int, np.ndarray]] = deque()  # (plan, number of the release, ids)
        self._left = np.zeros(num_blocks, np.int64)  # the release after which nobody refers to the block, 0 when settled
        self._releases = 0

    def take(self, count: int) -> np.ndarray:
        """`count` free blocks, int32, each with one reference. Raises CapacityError; callers make sure that they are there."""
        if count > self.free:
            raise CapacityError(f"{count} KV blocks wanted, {self.free} free")
        top = self.free - self.idle
        if count > top:
            self._evict(count - top)
            top = count
        ids = self._stack[top - count : top][::-1].copy()
        self.free -= count
        self.refs[ids] = 1
        self.ready[ids] = False
        return ids

    def share(self, ids: np.ndarray) -> None:
        """One more reference to each block (each occurs once)."""
        first = self._wake(ids) if self.index is not None else 0
        self.refs[ids] += 1
        self._shares += ids.size - first

    def release(self, ids: np.ndarray, after: int) -> None:
        """One reference less; blocks without any are free once plan `after`, the last that may name them, is committed."""
        self._releases += 1
        if self._shares:  # a block may occur twice in ids, or stay
            np.subtract.at(self.refs, ids, 1)
            dead = ids[self.refs[ids] == 0]
            order = np.arange(dead.size)
            self._left[dead] = order
            dead = dead[self._left[dead] == order]
            self._shares -= ids.size - dead.size
            ids = dead
        else:
            self.refs[ids] = 0
        if ids.size:
            self._left[ids] = self._releases
            self.deferred += ids.size
            self._waiting.append((after, self._releases, ids))

    def reclaim(self, committed: int) -> None:
        """Plan `committed` and all before it are done: what waited for them is free."""
        while self._waiting and self._waiting[0][0] <= committed:
            _, number, ids = self._waiting.popleft()
            if self.index is not None:
                ids = ids[self._left[ids] == number]  # not those that were shared since
            self._left[ids] = 0
            self.deferred -= ids.size
            self.free += ids.size
            if self.index is not None:
                ids = self._lay_down(self.index, ids)
            top = self.free - self.idle
            self._stack[top - ids.size : top] = ids

    # ---- with a prefix index

    def _lay_down(self, index: PrefixIndex, ids: np.ndarray) -> np.ndarray:
        """Kept blocks become idle, later columns first; returns the others."""
        kept = self.kept[ids]
        idle = ids[kept][::-1]
        if idle.size:
            self.idle += idle.size
            index.idle(self.group, idle)
        return ids[~kept]

    def _wake(self, ids: np.ndarray) -> int:
        """Blocks that nobody referred to are referred to again: how many."""
        unused = ids[self.refs[ids] == 0]
        if unused.size:
            if not self.kept[unused].all():
                raise PluginError("the prefix index matched blocks that were not kept in it")
            idle = unused[self._left[unused] == 0]
            self._left[unused] = 0
            self.deferred -= unused.size - idle.size
            self.idle -= idle.size
            self.free -= idle.size
            if idle.size and self.index is not None:
                self.index.used(self.group, idle)
        return unused.size

    def wakes(self, ids: np.ndarray) -> int:
        """How many free blocks `share` would take."""
        return int(np.count_nonzero((self.refs[ids] == 0) & (self._left[ids] == 0)))

    def _evict(self, count: int) -> None:
        assert self.index is not None
        ids, keys = self.index.evict(self.group, count)
        if ids.size != count or self.wakes(ids) != count or not self.kept[ids].all():
            raise PluginError(f"the prefix index was asked for {count} idle blocks and gave {ids}")
        self.forget(ids)
        if self.evicted is not None:
            self.evicted(self.group, ids, keys)

    def give_up(self) -> None:
        """Evict all idle blocks, least recently used first."""
        if self.idle:
            self._evict(self.idle)

    def forget(self, ids: np.ndarray) -> None:
        """The index keeps these blocks no longer."""
        self.kept[ids] = False
        idle = ids[(self.refs[ids] == 0) & (self._left[ids] == 0)]
        top = self.free - self.idle
        self._stack[top : top + idle.size] = idle
        self.idle -= idle.size

    def check(self, held: np.ndarray) -> None:
        """Raise AssertionError unless `held` [num_blocks] is what every block's count says and no block is lost."""
        wrong = np.flatnonzero(self.refs != held)
        assert not wrong.size, f"blocks {wrong[:8]}: counted {self.refs[wrong[:8]]}, held {held[wrong[:8]]}"
        waiting = [ids[self._left[ids] == number] for _, number, ids in self._waiting]
        idle = np.flatnonzero(self.kept & (self.refs == 0) & (self._left == 0))
        assert idle.size == self.idle, "idle blocks are miscounted"
        unused = np.concatenate([self._stack[: self.free - self.idle], *waiting, idle])
        times = np.bincount(unused, minlength=self.refs.size)
        assert self.refs[0] == 0 and not times[0], "the null block was handed out"
        assert times.max() <= 1, "a block is free twice"
        assert not self.refs[unused].any(), "a free block is held"
        assert unused.size + np.count_nonzero(self.refs) == self.capacity, "a block is lost"
        assert self.refs.sum() - np.count_nonzero(self.refs) == self._shares, "shares are miscounted"
        assert self.ready[self.kept].all(), "a kept block is not ready"
        if self.index is not None:
            known = np.sort(self.index.held(self.group))
            assert np.array_equal(known, np.flatnonzero(self.kept)), "the index and the pool disagree about what is kept"


@dataclass(frozen=True, slots=True, eq=False)
class BlockHandle:
    """References to the blocks of the first `tokens` positions of a request, in every group. Opaque outside this module.

    `owner` and `deadline` (seconds on the monotonic clock) make it a pin that `KVBlocks.expire` drops when overdue."""

    tokens: int
    ids: tuple[np.ndarray, ...]
    first: tuple[int, ...]  # column of ids[0]
    owner: str = ""
    deadline: float = float("inf")


def _ranges(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray | slice, np.ndarray]:
    """All integers of the intervals [first[i], last[i]): (i of each, as an index, and the integers)."""
    count = last - first
    if (count == 1).all():  # the usual case in a step of decodes
        return slice(None), first
    index = np.repeat(np.arange(count.size), count)
    return index, np.arange(index.size) + (first - count.cumsum() + count)[index]


class GroupBlocks:
    """Tables of one group: slot s has the blocks table[s, first[s]:count[s]], of which those below filled[s] are ready."""

    def __init__(
        self, group: KVGroup, num_blocks: int, allocation: Allocation, number: int = 0, index: PrefixIndex | None = None
    ) -> None:
        self.block_size = group.block_size or allocation.max_model_len
        self.window = None  # what a row and, after a hit, its recomputed positions see
        if group.kind == "window" and group.window is not None:
            self.window = group.window + allocation.lookback
        self.pool = BlockPool(num_blocks, number, index)
        self.ahead = allocation.draft_ahead
        self.row_blocks = (allocation.draft_width + self.ahead) // self.block_size + 2  # most that a decode row takes in a step
        longest = allocation.max_model_len + max(allocation.draft_width, self.ahead)
        self.columns = -(-longest // self.block_size) if self.block_size < allocation.max_model_len else 1
        self.table = np.zeros((allocation.max_slots, self.columns), np.int32)
        self.first, self.count, self.filled = (np.zeros(allocation.max_slots, np.int32) for _ in range(3))
        self._edits: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def demand(self, tokens: int, chunk: int) -> int:
        """Most blocks that `tokens` positions occupy at once when they are computed `chunk` at a time."""
        blocks = self.blocks(tokens)
        if self.window is not None:
            blocks = min(blocks, -(-(self.window - 1 + chunk + self.ahead) // self.block_size) + 1)
        return blocks

    def blocks(self, end: int) -> int:
        """Columns that a row needs which computes positions below `end` (and whose drafter writes further ones)."""
        return min(-(-(end + self.ahead) // self.block_size), self.columns)

    def lack(self, rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """How many blocks slots rows[i] still need to compute positions below ends[i]; never negative."""
        wanted = (ends + (self.ahead + self.block_size - 1)) // self.block_size
        return np.maximum(np.minimum(wanted, self.columns) - self.count[rows], 0)

    def reach(self, count: int) -> int:
        """Positions that a row with that many columns can compute: the inverse of `blocks`."""
        return _FAR if count >= self.columns else count * self.block_size - self.ahead

    def extend(self, rows: np.ndarray, ends: np.ndarray) -> None:
        """Take what positions below ends[i] of slot rows[i] still lack, in one slice of the pool."""
        count = self.count[rows]
        wanted = count + self.lack(rows, ends)
        index, columns = _ranges(count, wanted)
        if columns.size:
            self._edit(rows[index], columns, self.pool.take(columns.size))
            self.count[rows] = wanted

    def fill(self, rows: np.ndarray, computed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The KV of computed[i] positions of slot rows[i] is there: the blocks that are ready now, as (slots, columns, ids)."""
        filled = self.filled[rows]
        full = np.maximum(computed // self.block_size, filled)
        index, columns = _ranges(filled, full)
        slots = rows[index]
        ids = self.table[slots, columns]
        self.pool.ready[ids] = True
        self.filled[rows] = full
        return slots, columns, ids

    def trim(self, rows: np.ndarray, computed: np.ndarray, after: int) -> None:
        """Give back the blocks behind the window."""
        if self.window is None:
            return
        keep = (computed - self.window + 1) // self.block_size
        keep = np.minimum(np.maximum(keep, self.first[rows]), self.count[rows])
        index, columns = _ranges(self.first[rows], keep)
        if columns.size:
            ids = self.table[rows[index], columns]
            self._edit(rows[index], columns, np.zeros(columns.size, np.int32))
            self.first[rows] = keep
            self.pool.release(ids, after)

    def boundary(self, rows: np.ndarray) -> np.ndarray:
        """The next committed count of each slot at which `commit` has something to do."""
        ready = (self.filled[rows] + 1) * self.block_size
        if self.window is None:
            return ready
        return np.minimum(ready, (self.first[rows] + 1) * self.block_size + self.window - 1)

    def close(self, slots: np.ndarray, after: int) -> None:
        index, columns = _ranges(self.first[slots], self.count[slots])
        self.pool.release(self.table[slots[index], columns], after)
        self.first[slots] = self.count[slots] = self.filled[slots] = 0

    def adopt(self, slot: int, ids: np.ndarray, first: int) -> None:
        """An empty slot starts with references to these blocks, which are ready, in columns first, first + 1, ..."""
        last = first + ids.size
        self.pool.share(ids)
        self._edit(np.full(ids.size, slot), np.arange(first, last), ids)
        self.first[slot], self.count[slot], self.filled[slot] = first, last, last

    def _edit(self, slots: np.ndarray, columns: np.ndarray, ids: np.ndarray) -> None:
        self.table[slots, columns] = ids
        self._edits.append((slots, columns, ids))

    def updates(self) -> BlockUpdate:
        """What changed in the tables since the last call, oldest first."""
        if not self._edits:
            return NOTHING
        edits, self._edits = self._edits, []
        slots, columns, ids = edits[0] if len(edits) == 1 else map(np.concatenate, zip(*edits))
        return BlockUpdate(*(column.astype(np.int32, copy=False) for column in (slots, columns, ids)))

    def held(self) -> np.ndarray:
        """References that the tables hold, by block."""
        index, columns = _ranges(self.first, self.count)
        return np.bincount(self.table[np.arange(self.first.size)[index], columns], minlength=self.pool.refs.size)


class KVBlocks:
    """The blocks of all groups. Rows are slots (intp arrays), counts are tokens; used by the scheduler, once per step each."""

    def __init__(self, groups: Sequence[KVGroup], allocation: Allocation, index: PrefixIndex | None = None) -> None:
        if len(groups) != len(allocation.num_blocks):
            raise CapacityError(f"{len(groups)} KV groups, but sizes for {len(allocation.num_blocks)}")
        sized = enumerate(zip(groups, allocation.num_blocks))
        self.groups = tuple(GroupBlocks(g, n, allocation, number, index) for number, (g, n) in sized)
        self.limit = np.full(allocation.max_slots, 0 if groups else _FAR, np.int32)  # tokens that the blocks are enough for
        self.filled: Callable[[list[tuple[np.ndarray, np.ndarray, np.ndarray]]], None] | None = None  # hears of ready blocks
        self._boundary = np.full(allocation.max_slots, 0 if groups else _FAR, np.int32)
        self._handles: set[BlockHandle] = set()
        self._leaving: list[int] = []  # closed slots whose blocks are not given back yet
        self._left_after = 0

    def free(self) -> tuple[int, ...]:
        return tuple(g.pool.free for g in self.groups)

    def deferred(self) -> tuple[int, ...]:
        return tuple(g.pool.deferred for g in self.groups)

    def demand(self, tokens: int, chunk: int) -> list[int]:
        """Per group, most blocks that a request with `tokens` computed positions holds at once."""
        return [min(g.demand(tokens, chunk), g.pool.capacity) for g in self.groups]

    def outstanding(self, slot: int, tokens: int, chunk: int) -> list[int]:
        """Per group, what a running slot lacks of its demand."""
        demand = self.demand(tokens, chunk)
        return [max(n - int(g.count[slot] - g.first[slot]), 0) for n, g in zip(demand, self.groups)]

    def shared(self, handle: BlockHandle) -> list[int]:
        """Per group, how many blocks `adopt` takes from a handle."""
        return [max(handle.tokens // g.block_size - first, 0) for g, first in zip(self.groups, handle.first)]

    def wakes(self, handle: BlockHandle) -> list[int]:
        """Per group, how many free blocks a handle of matched blocks refers to."""
        return [g.pool.wakes(ids) for g, ids in zip(self.groups, handle.ids)]

    def fits(self, tokens: int, chunk: int) -> bool:
        """Would such a request fit into empty pools?"""
        return all(g.demand(tokens, chunk) <= g.pool.capacity for g in self.groups)

    def need(self, slot: int, end: int) -> list[int]:
        """Per group, blocks that slot lacks to compute positions below `end`."""
        return [max(g.blocks(end) - int(g.count[slot]), 0) for g in self.groups]

    def needs(self, rows: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """[groups, rows]: `need` of many slots."""
        return np.array([g.lack(rows, ends) for g in self.groups])

    def plenty(self, rows: int) -> bool:
        """Enough free blocks for that many decode rows, whatever they lack (drafts included), without counting?"""
        return all([rows * g.row_blocks <= g.pool.free for g in self.groups])

    def reach(self, slot: int, taken: Sequence[int]) -> int:
        """Positions that slot can compute when `taken` of the free blocks of each group are spoken for."""
        return min((g.reach(int(g.count[slot]) + g.pool.free - t) for g, t in zip(self.groups, taken)), default=_FAR)

    def room(self, spare: Sequence[int], handle: BlockHandle | None) -> int:
        """Positions that a new slot can compute which may take `spare` blocks of each group and adopts that handle."""
        if handle is not None:
            columns = [handle.tokens // g.block_size for g in self.groups]
            spare = [f + n - w for f, n, w in zip(spare, columns, self.wakes(handle))]
        return min([g.reach(f) for g, f in zip(self.groups, spare)], default=_FAR)

    def extend(self, rows: np.ndarray, ends: np.ndarray) -> tuple[BlockUpdate, ...]:
        """Allocate for positions below ends[i] of slot rows[i]; what this plan has to tell the workers, per group."""
        short = (ends > self.limit.take(rows)).nonzero()[0]
        if short.size:
            rows, ends = rows[short], ends[short]
            for group in self.groups:
                group.extend(rows, ends)
            self.limit[rows] = reduce(np.minimum, [g.count[rows] * g.block_size - g.ahead for g in self.groups])
        return tuple([group.updates() for group in self.groups])

    def commit(self, rows: np.ndarray, computed: np.ndarray, after: int) -> None:
        """computed[i] positions of slot rows[i] are committed. `after`: the last plan made so far."""
        due = (computed >= self._boundary.take(rows)).nonzero()[0]
        if due.size:
            rows, computed = rows[due], computed[due]
            filled = [group.fill(rows, computed) for group in self.groups]
            if self.filled is not None:
                self.filled(filled)
            for group in self.groups:
                group.trim(rows, computed, after)
            self._boundary[rows] = reduce(np.minimum, [g.boundary(rows) for g in self.groups])

    def close(self, slot: int, after: int) -> None:
        """The slot gives back all it holds, at the next `reclaim`. `after`: the last plan made so far."""
        if self.groups:
            self.limit[slot] = self._boundary[slot] = 0
            self._leaving.append(slot)
            self._left_after = after

    def reclaim(self, committed: int) -> None:
        """Plan `committed` and all before it are done: blocks that only they name are free."""
        if self._leaving:
            slots, self._leaving = np.array(self._leaving), []
            for group in self.groups:
                group.close(slots, self._left_after)
        for group in self.groups:
            group.pool.reclaim(committed)

    def hold(self, slot: int, tokens: int, owner: str = "", deadline: float = float("inf")) -> BlockHandle:
        """References to the blocks of the first `tokens` positions of a slot, whose KV is committed."""
        ids, first = [], []
        for g in self.groups:
            start = int(g.first[slot])
            ids.append(g.table[slot, start : -(-tokens // g.block_size)].copy())
            first.append(start)
            g.pool.share(ids[-1])
        handle = BlockHandle(tokens, tuple(ids), tuple(first), owner, deadline)
        self._handles.add(handle)
        return handle

    def reserve(self, matched: Sequence[np.ndarray], count: int) -> tuple[BlockHandle, tuple[np.ndarray, ...]]:
        """References to matched blocks of each group and to `count` fresh ones, and which the fresh ones are."""
        for group, ids in zip(self.groups, matched):
            group.pool.share(ids)
        fresh = tuple(group.pool.take(count) for group in self.groups)
        both = tuple(np.concatenate(pair) for pair in zip(matched, fresh))
        handle = BlockHandle(0, both, (0,) * len(both))
        self._handles.add(handle)
        return handle, fresh

    def drop(self, handle: BlockHandle, after: int) -> None:
        """Give a handle's references back; idempotent."""
        if handle in self._handles:
            self._handles.remove(handle)
            for group, ids in zip(self.groups, handle.ids):
                group.pool.release(ids, after)

    def expire(self, now: float, after: int) -> tuple[BlockHandle, ...]:
        """Drop the handles whose deadline has passed."""
        overdue = tuple(handle for handle in self._handles if handle.deadline < now)
        for handle in overdue:
            self.drop(handle, after)
        return overdue

    def adopt(self, slot: int, handle: BlockHandle) -> None:
        """An empty slot shares the full blocks of a handle; `copies` then fills the partial one, once it is allocated."""
        for group, ids, first, count in zip(self.groups, handle.ids, handle.first, self.shared(handle)):
            group.adopt(slot, ids[:count], first)
        self.limit[slot] = min(int(g.count[slot]) * g.block_size - g.ahead for g in self.groups)

    def copies(self, forks: Sequence[tuple[int, BlockHandle]]) -> tuple[Copies, ...]:
        """Per group, the single-token copies that complete the last block of slots that adopted a handle."""
        return tuple(_partial_copies(g, i, forks) for i, g in enumerate(self.groups)) if forks else ()

    def check(self) -> None:
        """Raise AssertionError unless every reference count is what tables and handles hold and no block is lost."""
        for i, group in enumerate(self.groups):
            held = group.held()
            assert (group.filled <= group.count).all() and (group.first <= group.count).all(), "a table has blocks out of order"
            for handle in self._handles:
                np.add.at(held, handle.ids[i], 1)
            group.pool.check(held)


def _partial_copies(group: GroupBlocks, index: int, forks: Sequence[tuple[int, BlockHandle]]) -> Copies:
    src, dst = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for slot, handle in forks:
        column, rest = divmod(handle.tokens, group.block_size)
        if rest:
            source = int(handle.ids[index][column - handle.first[index]])
            src.append(source * group.block_size + np.arange(rest))
            dst.append(int(group.table[slot, column]) * group.block_size + np.arange(rest))
    return Copies(np.concatenate(src), np.concatenate(dst))
