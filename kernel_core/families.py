"""n completions of one prompt: the first computes it, the others share its full blocks, copy the partial one, and
recompute the last token with its KV write masked."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kernel_core.blocks import BlockHandle, KVBlocks
from kernel_core.plan import PROMPT_LOGPROBS
from kernel_core.waiting import Entry

GATE = "kernel:family"  # closed for the siblings until the first has computed the prompt; no plugin's gate has this name


@dataclass(slots=True)
class Family:
    leader: Entry
    pending: dict[Entry, None] = field(default_factory=dict)  # siblings that never had a slot
    handle: BlockHandle | None = None


class Families:
    """Which requests wait for which. A handle lives until every sibling had a slot, or until the pool runs short."""

    def __init__(self, kv: KVBlocks) -> None:
        self.kv = kv
        self.leaders: dict[Entry, str] = {}  # those whose prompt is not computed yet
        self.computing: dict[Entry, None] = {}  # of these, those that own a slot
        self._families: dict[str, Family] = {}

    def join(self, entry: Entry) -> None:
        """A request arrives: it leads its family, waits for the leader, or goes its own way when it is not a plain sibling
        (another prompt or identity, or prompt logprobs, which need the prompt's forward)."""
        name = entry.request.family
        if name is None or entry.request.flags & PROMPT_LOGPROBS or not self.kv.groups:
            return
        family = self._families.get(name)
        if family is None:
            self._families[name] = Family(entry)
            self.leaders[entry] = name
        elif _same_prompt(family.leader, entry):
            family.pending[entry] = None
            if family.handle is None:
                entry.closed_gates.add(GATE)

    def prefix(self, entry: Entry) -> BlockHandle | None:
        """What an entry that is about to open can share."""
        family = self._families.get(entry.request.family or "")
        return family.handle if family is not None and entry in family.pending else None

    def computed(self, leader: Entry, after: int) -> list[Entry]:
        """The leader's whole prompt is committed: hold its blocks; the siblings whose gate opens now."""
        del self.computing[leader]
        family = self._families[self.leaders.pop(leader)]
        if family.pending:
            family.handle = self.kv.hold(leader.slot, leader.num_prompt)
        return self._release(family, after)

    def seated(self, entry: Entry, after: int) -> None:
        """A request that shares blocks got its slot in plan `after`; it may be a sibling."""
        family = self._families.get(entry.request.family or "")
        if family is not None and entry in family.pending:
            del family.pending[entry]
            self._release(family, after)

    def leave(self, entry: Entry, after: int) -> list[Entry]:
        """A request ended. Returns the next leader, whose gate opens, when its prompt was not computed yet."""
        family = self._families.get(entry.request.family or "")
        if family is None:
            return []
        family.pending.pop(entry, None)
        if entry not in self.leaders:
            if family.handle is not None:
                self._release(family, after)
            return []
        name = self.leaders.pop(entry)
        if not family.pending:
            del self._families[name]
            return []
        family.leader = next(iter(family.pending))
        del family.pending[family.leader]
        self.leaders[family.leader] = name
        return [family.leader]

    def _release(self, family: Family, after: int) -> list[Entry]:
        if not family.pending:
            if family.handle is not None:
                self.kv.drop(family.handle, after)
            del self._families[family.leader.request.family or ""]
        return [entry for entry in family.pending if GATE in entry.closed_gates]

    def evict(self, after: int) -> bool:
        """Give back the blocks of one family that waits for slots; its siblings compute the prompt themselves."""
        for name, family in self._families.items():
            if family.handle is not None:
                self.kv.drop(family.handle, after)
                del self._families[name]
                return True
        return False


def _same_prompt(a: Entry, b: Entry) -> bool:
    one, other = a.request, b.request
    return one.identity == other.identity and np.array_equal(one.token_ids, other.token_ids)
