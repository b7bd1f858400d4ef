"""The kernel's side of a connector: it hears which kept blocks the pools give up, and what it stores of a request's prompt is
fetched into fresh blocks before the request is admitted. The prefix index then keeps these blocks like any others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from kernel_core.blocks import BlockHandle, KVBlocks
from kernel_core.plan import Ack, Job
from kernel_core.protocols import Connector, PrefixHit, PrefixIndex
from kernel_core.waiting import Entry, State


@dataclass(slots=True)
class Fetch:
    """Blocks on their way: `ids` per group will hold the content of `keys`; `handle` holds them, and the hit before them."""

    entry: Entry
    gate: str
    keys: Sequence[bytes]
    ids: tuple[np.ndarray, ...]
    handle: BlockHandle


class Fetches:
    """`wake` gets a request whose gate opens."""

    def __init__(self, connector: Connector, index: PrefixIndex, kv: KVBlocks, wake: Callable[[Entry], None]) -> None:
        self.connector, self.index, self.kv, self.wake = connector, index, kv, wake
        self.running: dict[str, Fetch] = {}  # by the key of their job
        self._void: set[str] = set()  # of these, those whose blocks nobody may find
        self._loads: list[Job] = []
        for group in kv.groups:
            group.pool.evicted = connector.evicted

    def start(self, entry: Entry, hit: PrefixHit, spare: list[int]) -> None:
        """Close the request's gate if more of its prompt is stored. Once for each time it gets a slot. `spare`: blocks per group
        that may be taken; updated."""
        if entry.fetched or entry.prefix is None:
            return
        columns = hit.tokens // self.kv.groups[0].block_size
        keys = self.index.keys(entry.prefix)[columns:]
        before = [ids[: max(columns - first, 0)] for ids, first in zip(hit.ids, hit.first)]
        woken = [group.pool.wakes(ids) for group, ids in zip(self.kv.groups, before)]
        count = min(self.connector.find(keys), *(free - used for free, used in zip(spare, woken)))
        if count <= 0:
            return
        entry.fetched = True
        handle, ids = self.kv.reserve(before, count)
        spare[:] = [free - used - count for free, used in zip(spare, woken)]
        job = self.connector.load(keys[:count], ids)
        gate = f"{job.plugin}:{job.key}"
        entry.closed_gates.add(gate)
        self.running[job.key] = Fetch(entry, gate, keys[:count], ids, handle)
        self._loads.append(job)

    def jobs(self) -> list[Job]:
        """For the plan that is being made, once all its blocks were taken: reads of what it overwrites first."""
        loads, self._loads = self._loads, []
        return [*self.connector.saves(), *loads]

    def closing(self) -> list[Job]:
        """The engine ends: what the pools still keep is offered to a connector that keeps it for later ones."""
        if not getattr(self.connector, "closing", lambda: False)():
            return []
        for group in self.kv.groups:
            group.pool.give_up()
        return self.jobs()

    def acked(self, ack: Ack, after: int) -> bool:
        """Was it one of the connector's jobs? `after`: the last plan made so far."""
        if ack.plugin != self.connector.name:
            return False
        self.connector.done(ack)
        fetch = self.running.pop(ack.key, None)
        if fetch is not None:
            if ack.error is None and ack.key not in self._void:
                kept = self.index.restore(fetch.keys, fetch.ids)
                for group, ids, mine in zip(self.kv.groups, fetch.ids, kept):
                    group.pool.ready[ids] = True
                    group.pool.kept[ids[mine]] = True
            self._void.discard(ack.key)
            self.kv.drop(fetch.handle, after)
            fetch.entry.closed_gates.discard(fetch.gate)
            if fetch.entry.state is State.GATED and not fetch.entry.closed_gates:
                self.wake(fetch.entry)
        return True

    def reset(self) -> None:
        """The index was emptied: what is on its way belongs to the past."""
        self._void.update(self.running)
