"""The kernel's side of a prefix index: look-ups at admission, requests that wait for blocks another one is computing, and
telling the index of filled blocks. Without an index every question is answered at once.

Telling it is what costs (hashes), so a commit only notes what was filled, and the loop has it told while the device works
(`tend`). Blocks are told earlier when somebody needs them: those of a request that ends, and all before a look-up that would
otherwise miss what it waited for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kernel_core.blocks import BlockHandle, KVBlocks
from kernel_core.fetches import Fetches
from kernel_core.plan import NO_PREFIX_READ, NO_PREFIX_WRITE, PROMPT_LOGPROBS
from kernel_core.protocols import Connector, PrefixHit, PrefixIndex, PrefixRequest
from kernel_core.slots import Slots
from kernel_core.waiting import Entry, State

GATE = "kernel:prefix"  # closed while the request waits for another one's blocks; no plugin's gate has this name
OWNER = "prefix"  # of handles: their blocks are matched, not held


class Prefixes:
    """`wake` gets a request whose gate opens. `lookback`: positions of a hit that a drafter needs computed again."""

    def __init__(
        self,
        index: PrefixIndex | None,
        kv: KVBlocks,
        slots: Slots,
        lookback: int,
        wake: Callable[[Entry], None],
        connector: Connector | None = None,
    ) -> None:
        self.index, self.kv, self.slots, self.wake = index, kv, slots, wake
        self.fetches = Fetches(connector, index, kv, wake) if connector is not None and index is not None else None
        self.recompute = max(lookback, 1)
        self.writes = np.zeros(slots.since.size, np.bool_)  # slots whose blocks are offered
        self.waiters: dict[int, list[tuple[int, Entry]]] = {}  # by slot, (committed tokens that they wait for, who)
        self._sources: list[tuple[int, np.ndarray]] = []  # (group, blocks) that the plan being made copies from
        self._untold: list[np.ndarray] = []  # filled blocks: [2 + groups, n] slots, columns, ids
        self._owes = np.zeros(slots.since.size, np.bool_)  # slots that have some
        self._defers = all(group.window is None for group in kv.groups)  # else a block may be given back before it is told
        if index is not None:
            kv.filled = self._filled

    def _match(self, index: PrefixIndex, entry: Entry) -> PrefixHit | None:
        request = entry.request
        if request.flags & (NO_PREFIX_READ | PROMPT_LOGPROBS):
            return None  # prompt logprobs need the forward of the whole prompt
        hit = index.match(self._request(entry), self.recompute)
        if self._untold and hit.owner >= 0 and self.slots.computed_done[hit.owner] >= hit.until:
            self.tend()
            hit = index.match(self._request(entry), self.recompute)
        return hit

    def _request(self, entry: Entry) -> PrefixRequest:
        if entry.prefix is None:
            request = entry.request
            entry.prefix = PrefixRequest(request.id, entry.tokens, request.identity, request.spans)
        return entry.prefix

    # ---- admission

    def arrived(self, entry: Entry) -> None:
        """A request comes: let the index compute what it needs of it now, and not while a plan is made."""
        if self.index is not None:
            self._match(self.index, entry)

    def expected(self, entry: Entry) -> int:
        """Tokens that the request would be spared if it were admitted now, or when those it would wait for are computed."""
        hit = self._match(self.index, entry) if self.index is not None else None
        return 0 if hit is None else max(hit.tokens, hit.until if hit.owner >= 0 else 0)

    @property
    def fetching(self) -> bool:
        """Is there something that will give blocks back by itself?"""
        return self.fetches is not None and bool(self.fetches.running)

    def find(self, entry: Entry, spare: list[int]) -> BlockHandle | None:
        """What the request can share, or None. It may have to wait instead: then a gate is closed. `spare`: blocks per group that
        may be taken for what a connector stores of it.

        It waits for a running request that is computing more of its prompt than it waited for before, so not for ever."""
        hit = self._match(self.index, entry) if self.index is not None else None
        if hit is None:
            return None
        if hit.owner >= 0 and hit.until > max(hit.tokens, entry.awaited):
            entry.awaited = hit.until
            entry.closed_gates.add(GATE)
            self.waiters.setdefault(hit.owner, []).append((hit.until, entry))
        elif self.fetches is not None:
            self.fetches.start(entry, hit, spare)
        return BlockHandle(hit.tokens, hit.ids, hit.first, OWNER) if hit.tokens else None

    def whole_blocks(self, handle: BlockHandle) -> BlockHandle:
        """The same without the block that would be copied."""
        counts = self.kv.shared(handle)
        tokens = handle.tokens - handle.tokens % self.kv.groups[0].block_size
        return replace(handle, tokens=tokens, ids=tuple(ids[:count] for ids, count in zip(handle.ids, counts)))

    def opened(self, entry: Entry, handle: BlockHandle | None) -> None:
        """The request has its slot. What it copies from must not be taken by others before the plan is made."""
        if self.index is None:
            return
        if handle is not None and handle.owner == OWNER:
            for number, (ids, count) in enumerate(zip(handle.ids, self.kv.shared(handle))):
                if ids.size > count:
                    self.kv.groups[number].pool.share(ids[count:])
                    self._sources.append((number, ids[count:]))
        if not entry.request.flags & NO_PREFIX_WRITE:
            self.writes[entry.slot] = True
            self.index.opened(entry.slot, self._request(entry), 0 if handle is None else handle.tokens)

    def planned(self, plan_id: int) -> None:
        """The plan is made: when it is committed the copies are done."""
        if self._sources:
            for number, ids in self._sources:
                self.kv.groups[number].pool.release(ids, plan_id)
            self._sources = []

    # ---- commit

    def _filled(self, groups: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
        blocks = np.array([groups[0][0], groups[0][1], *(filled[2] for filled in groups)])
        offered = self.writes[blocks[0]]
        if offered.any():
            self._untold.append(blocks if offered.all() else blocks[:, offered])
            self._owes[self._untold[-1][0]] = True
        if not self._defers:
            self.tend()

    def tend(self) -> None:
        """Tell the index what was filled. Called while the device works, and when somebody needs it earlier."""
        if self._untold:
            untold, self._untold = self._untold, []
            self._tell(untold[0] if len(untold) == 1 else np.concatenate(untold, 1))

    def ending(self, slots: np.ndarray) -> None:
        """These slots are about to be closed: tell what is theirs."""
        if self._owes[slots].any():
            blocks = np.concatenate(self._untold, 1)
            leaves = np.zeros(self.writes.size, np.bool_)
            leaves[slots] = True
            theirs = leaves[blocks[0]]
            self._untold = [] if theirs.all() else [blocks[:, ~theirs]]
            self._tell(blocks[:, theirs])

    def _tell(self, blocks: np.ndarray) -> None:
        if blocks.size and self.index is not None:
            slots, columns, *ids = blocks
            self._owes[slots] = False
            for group, own, kept in zip(self.kv.groups, ids, self.index.insert(slots, columns, ids, self.slots.tokens)):
                group.pool.kept[own[kept]] = True

    def committed(self) -> None:
        """Counts of running requests grew: who has waited for them?"""
        for slot, waiting in list(self.waiters.items()):
            done = self.slots.computed_done[slot]
            rest = self.waiters[slot] = [item for item in waiting if item[0] > done]
            if not rest:
                del self.waiters[slot]
            self._wake([item for item in waiting if item[0] <= done])

    def closed(self, slot: int) -> None:
        """A request left its slot: those that waited for it go on with what there is."""
        if self.index is not None:
            if self.writes[slot]:
                if self._owes[slot]:
                    self.ending(np.array([slot]))
                self.writes[slot] = False
                self.index.closed(slot)
            self._wake(self.waiters.pop(slot, []))

    def _wake(self, waiting: list[tuple[int, Entry]]) -> None:
        for _, entry in waiting:
            entry.closed_gates.discard(GATE)
            if entry.state is State.GATED and not entry.closed_gates:
                self.wake(entry)

    def spoilt(self, entry: Entry) -> None:
        """Its blocks were lost, or gave a result that is no number: nobody may find them again."""
        self.tend()
        slot = entry.slot
        if slot < 0:  # preempted meanwhile: nobody knows any more which blocks it had
            return self.reset()
        for number, group in enumerate(self.kv.groups if self.index is not None else ()):
            ids = group.table[slot, group.first[slot] : group.count[slot]]
            ids = ids[group.pool.kept[ids]]
            if ids.size and self.index is not None:
                self.index.drop(number, ids)
                group.pool.forget(ids)

    def reset(self) -> None:
        """Forget everything; running requests offer nothing any more."""
        if self.index is None:
            return
        self._untold = []
        self.index.reset()
        if self.fetches is not None:
            self.fetches.reset()
        self.writes[:] = self._owes[:] = False
        for group in self.kv.groups:
            group.pool.forget(np.flatnonzero(group.pool.kept))
        for slot in list(self.waiters):
            self._wake(self.waiters.pop(slot))
