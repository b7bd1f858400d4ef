"""Which rows a step computes: decodes first, then chunks of running prompts, then admissions, within the token budget and
the KV blocks. What a device cannot do (mixed lengths, many long rows, odd lengths) is obeyed as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from kernel_core.blocks import BlockHandle, KVBlocks
from kernel_core.config import EngineConfig
from kernel_core.errors import ConfigError
from kernel_core.families import Families
from kernel_core.plan import Allocation, Capabilities, Opened
from kernel_core.policy import FirstComeFirstServed
from kernel_core.prefixes import OWNER, Prefixes
from kernel_core.protocols import Policy, RequestView, Resource
from kernel_core.slots import Slots
from kernel_core.waiting import Entry, WaitingQueue

NO_ROOM = "the request does not fit into the KV cache: {need} blocks per group needed, {have} free; shorten it or raise kv_memory"
_NO_ROWS = np.zeros(0, np.intp)
_ANY = 1 << 30


@dataclass(slots=True)
class Selection:
    """Rows chosen so far: `rows` (decodes) with their q and room as arrays, `more` as (slot, q, room). Per KV group, `taken`
    counts the blocks that they need, `secured` says which row counted what."""

    budget: int
    inflight: bool  # plans with rows are in flight: their commits may free blocks
    taken: list[int]
    long_rows: int = _ANY  # how many more rows may have q > 1
    length: int | None = None  # the q of all rows, where the device allows no mix
    rows: np.ndarray = field(default_factory=lambda: _NO_ROWS)
    q: np.ndarray = field(default_factory=lambda: _NO_ROWS.astype(np.int32))
    room: np.ndarray = field(default_factory=lambda: _NO_ROWS.astype(np.int32))
    chasing: np.ndarray = field(default_factory=lambda: _NO_ROWS)  # slots with more than one token to compute
    more: list[tuple[int, int, int]] = field(default_factory=list)
    secured: dict[int, list[int]] = field(default_factory=dict)
    short: bool = False  # a pool ran empty: nobody is admitted in this step
    opened: list[Opened] = field(default_factory=list)
    forks: list[tuple[Entry, BlockHandle]] = field(default_factory=list)

    def secure(self, slot: int, need: list[int]) -> None:
        self.secured[slot] = need
        self.taken = [t + n for t, n in zip(self.taken, need)]

    def drop(self, slots: set[int]) -> None:
        """These rows are not computed in this step."""
        for slot in slots & self.secured.keys():
            self.taken = [t - n for t, n in zip(self.taken, self.secured.pop(slot))]
        keep = ~np.isin(self.rows, list(slots))
        self.rows, self.q, self.room = self.rows[keep], self.q[keep], self.room[keep]
        self.more = [row for row in self.more if row[0] not in slots]


class Lifecycle(Protocol):
    """What selecting rows may do to requests; the scheduler."""

    def view(self, entry: Entry) -> RequestView: ...
    def preempt(self, entry: Entry) -> None: ...
    def fail(self, entry: Entry, reason: str) -> None: ...
    def open(self, entry: Entry, handle: BlockHandle | None, computed: int) -> Opened: ...


class Selector:
    """Fills a `Selection`. Once per step; work in Python only for rows that are not plain decodes."""

    def __init__(
        self,
        config: EngineConfig,
        allocation: Allocation,
        capabilities: Capabilities,
        policy: Policy,
        resources: Mapping[str, Resource],
        parts: tuple[Slots, KVBlocks, WaitingQueue, Families, Prefixes],
        lifecycle: Lifecycle,
        depth: int,
    ) -> None:
        self.slots, self.kv, self.queue, self.families, self.prefixes = parts
        self.lookback = allocation.lookback
        self.policy, self.resources, self.lifecycle = policy, resources, lifecycle
        self.greedy = type(policy) is FirstComeFirstServed  # as large a chunk as there is room for: nobody to ask
        self.most = min(config.max_tokens_per_step, allocation.max_tokens_per_step)
        self._widest, self._longest, self.depth = allocation.draft_width, config.max_prompt_chunk or self.most, depth
        self.limit(self.most)
        self.mixed = capabilities.mixed_lengths
        self.max_long_rows = _ANY if capabilities.max_long_rows is None else capabilities.max_long_rows
        self.lengths = None if capabilities.query_lengths is None else np.sort(capabilities.query_lengths)
        if self.lengths is not None and self.lengths[0] != 1:
            raise ConfigError(f"the device must allow query length 1, it allows {self.lengths.tolist()}")
        if self.max_long_rows < 1:
            raise ConfigError("the device must allow at least one row with q > 1 (max_long_rows)")
        self._ones = np.ones(allocation.max_slots, np.int32)
        self._ones.setflags(write=False)  # plans share it
        self._chunk_turn = True

    def limit(self, tokens: int) -> None:
        """No step computes more than these from now on (at most `most`)."""
        self.budget = min(tokens, self.most)
        self.max_chunk = min(self._longest, self.budget)
        self.draft_width = min(self._widest, self.budget - 1)

    def select(self, inflight: bool) -> Selection:
        sel = Selection(self.budget, inflight, [0] * len(self.kv.groups), self.max_long_rows)
        rows, known = self._split(sel)
        prompts = bool(sel.chasing.size) or (len(self.queue) > 0 and self.slots.available > 0)
        if not self.mixed and prompts and (self._chunk_turn or not rows.size):
            self._prompts(sel)
            if sel.more:
                self._chunk_turn = False
                return sel
            rows, known = self._split(sel)
        self._chunk_turn = True
        if rows.size:
            self._decodes(sel, rows, known, prompts)
        if prompts:
            self._prompts(sel)
        return sel

    def _split(self, sel: Selection) -> tuple[np.ndarray, np.ndarray]:
        """Slots with exactly one token to compute, and their known counts; `sel.chasing` gets those with more."""
        rows = self.slots.rows
        known = self.slots.known.take(rows)
        pending = known - self.slots.computed.take(rows)
        decode = pending == 1
        if self.depth > 1:
            decode &= known < self.slots.max_len.take(rows)  # otherwise it waits for commits
        if decode.all():
            sel.chasing = _NO_ROWS
            return rows, known
        sel.chasing = rows[pending > 1]
        return rows[decode], known[decode]

    # ---- decodes --------------------------------------------------------------------------------------------------

    def _decodes(self, sel: Selection, rows: np.ndarray, known: np.ndarray, prompts: bool) -> None:
        room = self._ones[: rows.size]
        total = rows.size
        if self.draft_width and self.slots.width.take(rows).any():
            room = self._rooms(rows, known, prompts)
            total = int(room.sum())
        if total > sel.budget:
            order = np.argsort(self.slots.last.take(rows), kind="stable")
            chosen = np.sort(order[room[order].cumsum() <= sel.budget])
            rows, known, room = rows[chosen], known[chosen], room[chosen]
            total = int(room.sum())
        sel.rows, sel.q, sel.room = rows, room, room
        sel.budget -= total
        if total > rows.size:
            sel.long_rows -= int((room > 1).sum())
        if not self.mixed:
            sel.length = int(room[0])
        self._secure(sel, known + room - 1, prompts)

    def _rooms(self, rows: np.ndarray, known: np.ndarray, prompts: bool) -> np.ndarray:
        """1 + the drafts that each row may carry."""
        room = np.minimum(np.minimum(self.slots.width.take(rows), self.draft_width), self.slots.max_len.take(rows) - known - 1)
        room += 1
        if self.lengths is not None:
            room = self.lengths[np.searchsorted(self.lengths, room, "right") - 1].astype(np.int32)
        if not self.mixed:
            room[:] = room.min()
        allowed = self.max_long_rows - prompts
        if (room > 1).sum() > allowed:
            room[np.flatnonzero(room > 1)[0 if not self.mixed else allowed :]] = 1
        return room

    def _secure(self, sel: Selection, ends: np.ndarray, prompts: bool) -> None:
        """Make sure that every decode row can have its blocks; rows that cannot are left out."""
        short = (ends > self.kv.limit.take(sel.rows)).nonzero()[0]
        if not short.size or (not prompts and self.kv.plenty(short.size)):
            return
        slots = sel.rows[short]
        needs = self.kv.needs(slots, ends[short])
        total, need = needs.sum(1).tolist(), dict(zip(slots.tolist(), needs.T.tolist()))
        if all(t <= f for t, f in zip(total, self.kv.free())):
            sel.taken, sel.secured = total, need
            return
        out = set()
        for slot in sorted(need, key=lambda slot: self.slots.entries[slot].key):
            entry = self.slots.entries[slot]
            if entry is not None and self._make_room(sel, entry, need[slot]):
                sel.secure(slot, need[slot])
            else:
                out.add(slot)
        sel.drop(out)

    # ---- shortage -------------------------------------------------------------------------------------------------

    def _make_room(self, sel: Selection, entry: Entry, need: list[int]) -> bool:
        """Can this running request have `need` more blocks? Preempts until it can. False: not in this step."""
        while not all(t + n <= f for t, n, f in zip(sel.taken, need, self.kv.free())):
            sel.short = True
            if self.families.evict(self.slots.last_plan):
                continue
            if any(self.kv.deferred()) or self.prefixes.fetching:
                return False  # a commit will bring them
            victim = self._victim()
            if victim is None:
                if not sel.inflight:
                    self.lifecycle.fail(entry, NO_ROOM.format(need=need, have=self.kv.free()))
                return False
            sel.drop({victim.slot})
            self.lifecycle.preempt(victim)
            if victim is entry:
                return False
        return True

    def _victim(self) -> Entry | None:
        """The policy's choice among all but the first in its order, so that always somebody gets through."""
        running = [entry for entry in self.slots.entries if entry is not None]
        running.remove(min(running, key=lambda entry: entry.key))
        if not running:
            return None
        chosen = self.policy.victim([self.lifecycle.view(entry) for entry in running])
        return next(entry for entry in running if entry.request.id == chosen)

    # ---- prompts --------------------------------------------------------------------------------------------------

    def _prompts(self, sel: Selection) -> None:
        chasing = [self.slots.entries[slot] for slot in sel.chasing.tolist()]
        for entry in sorted((entry for entry in chasing if entry is not None), key=lambda entry: entry.key):
            if sel.budget > 0 and entry.slot >= 0:
                self._chunk(sel, entry)
        if not sel.short and len(self.queue):
            self._admissions(sel)

    def _size(self, sel: Selection, entry: Entry, remaining: int) -> int:
        limit = min(remaining, sel.budget, self.max_chunk)
        if not self.greedy:
            limit = min(max(self.policy.chunk(self.lifecycle.view(entry), remaining, limit), 0), limit)
        return self._allowed(sel, limit)

    def _allowed(self, sel: Selection, size: int) -> int:
        """The largest q up to `size` that the device takes in this step, or 0."""
        if sel.length is not None:
            size = sel.length if size >= sel.length else 0
        elif self.lengths is not None and size > 0:
            size = int(self.lengths[np.searchsorted(self.lengths, size, "right") - 1])
        return size if size <= 1 or sel.long_rows > 0 else 0

    def _chunk(self, sel: Selection, entry: Entry) -> None:
        """One more chunk of a running prompt, as large as budget, policy, device and blocks allow."""
        start = int(self.slots.computed[entry.slot])
        remaining = int(self.slots.known[entry.slot]) - start
        size = self._size(sel, entry, remaining)
        if size and self.kv.reach(entry.slot, sel.taken) <= start:
            size = size if self._make_room(sel, entry, self.kv.need(entry.slot, start + 1)) else 0
        if size:
            size = self._allowed(sel, min(size, self.kv.reach(entry.slot, sel.taken) - start))
        if size:
            self._add(sel, entry.slot, size, remaining)
            sel.secure(entry.slot, self.kv.need(entry.slot, start + size))

    def _add(self, sel: Selection, slot: int, size: int, remaining: int) -> None:
        sel.more.append((slot, size, int(size == remaining)))
        sel.budget -= size
        sel.long_rows -= size > 1
        if not self.mixed:
            sel.length = size

    # ---- admission ------------------------------------------------------------------------------------------------

    def _admissions(self, sel: Selection) -> None:
        spare = [f - t for f, t in zip(self.kv.free(), sel.taken)]  # running prompts first get what they need to the end
        for slot in sel.chasing.tolist():
            lack = self.kv.outstanding(slot, int(self.slots.known[slot]), self.max_chunk)
            spare = [f - max(n - s, 0) for f, n, s in zip(spare, lack, sel.secured.get(slot, lack))]
        while sel.budget > 0 and self.slots.available:
            entry = self.queue.first()
            if entry is None or not self._admit(sel, entry, spare):
                return

    def _admit(self, sel: Selection, entry: Entry, spare: list[int]) -> bool:
        """Try the first in line; False: nobody else is admitted in this step."""
        known = entry.tokens.size
        handle = self.families.prefix(entry) or self.prefixes.find(entry, spare)
        if entry.closed_gates:
            self.queue.gate(entry)
            return True
        whole = self.kv.demand(min(known + 1, entry.request.max_len - 1), min(self.max_chunk, known))
        handle, left = self._affordable(handle, whole, spare)
        if left is None:
            return self._no_blocks(sel, entry, whole)
        computed = 0 if handle is None else max(min(handle.tokens - self.lookback, known - 1), 0)
        size = self._size(sel, entry, known - computed)
        if min(left, default=1) <= 0:  # else the pools are not even full with all that it may ever need
            size = self._allowed(sel, min(size, self.kv.room(spare, handle) - computed))
        if not size:
            return False
        if not self._reserve(entry):
            first_in_line = self.queue.overdue() is entry
            self.queue.refuse(entry)
            return not first_in_line
        self.queue.admit(entry)
        sel.opened.append(self.lifecycle.open(entry, handle, computed))
        if handle is not None:
            sel.forks.append((entry, handle))
        spare[:] = left
        self._add(sel, entry.slot, size, known - computed)
        return True

    def _affordable(
        self, handle: BlockHandle | None, whole: list[int], spare: list[int]
    ) -> tuple[BlockHandle | None, list[int] | None]:
        """What a request adopts that needs `whole` blocks per group, and how many are left then; None: there are not enough."""
        left = [f - n for f, n in zip(spare, whole)]
        if handle is not None:
            shared, woken = self.kv.shared(handle), self.kv.wakes(handle)
            left = [f - max(n - s, 0) - w for f, n, s, w in zip(spare, whole, shared, woken)]
        if not left or min(left) >= 0:
            return handle, left
        if handle is not None and handle.owner == OWNER and handle.tokens % self.kv.groups[0].block_size:
            smaller = self.prefixes.whole_blocks(handle)  # perhaps without what it copies from
            return self._affordable(smaller if smaller.tokens else None, whole, spare)
        return handle, None

    def _no_blocks(self, sel: Selection, entry: Entry, demand: list[int]) -> bool:
        """The first in line waits for blocks; when nobody is left to free any, it cannot be served."""
        if sel.inflight or sel.more or self.slots.rows.size or any(self.kv.deferred()) or self.prefixes.fetching:
            return False
        if not self.families.evict(self.slots.last_plan):
            self.lifecycle.fail(entry, NO_ROOM.format(need=demand, have=self.kv.free()))
        return True

    def _reserve(self, entry: Entry) -> bool:
        """All resources grant, or none is kept."""
        request = entry.request
        for name, want in request.resources.items():
            if not self.resources[name].reserve(request.id, want):
                for other in request.resources:
                    self.resources[other].release(request.id)
                return False
        return True
