"""The index: full blocks under the hashes of all that their KV depends on, and idle ones in the order of their last use.

The digest of block c of a request is SHA-256 over a hash of its identity (adapter, salt), followed by all its token ids as int32
up to the block's end; where media enter the sequence, a hash of the digest so far and their keys goes on instead. So equal
digests mean equal content, and nobody can make up another prompt that has the digest of somebody else's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np

from kernel_core.api import EngineContext, KVGroup, PrefixHit, PrefixRequest, encode
from kernel_prefix_caching.idle import IdleBlocks
from kernel_prefix_caching.siblings import Siblings

ALIKE = 2  # tokens that a block must share with a prompt to be copied: one alone saves nothing, and prompts often share the first
CANDIDATES = 64  # newest of these blocks that are compared
TOKEN = 4  # bytes
logger = logging.getLogger("kernel_core.prefix_caching")


def make_index(context: EngineContext) -> HashIndex | None:
    """The index of an engine's KV groups; None, and a line in the log, where they keep nothing that can be found again."""
    groups = context.groups
    sizes = {group.block_size for group in groups}
    if not groups:
        return None
    if len(sizes) > 1 or not 0 < min(sizes) < context.max_model_len:
        logger.warning(
            "prefix caching is off: it needs KV blocks of one size, smaller than a request; they have %s", sorted(sizes)
        )
        return None
    kinds = {group.kind for group in groups} - {"full", "window"}
    if kinds:
        logger.warning("prefix caching is off: it cannot find KV of the kind %s again", ", ".join(sorted(kinds)))
        return None
    return HashIndex(groups, context.num_blocks)


class Chain:
    """The digests of a request's full blocks, digests[c + 1] that of block c; digests[0] is that of its identity. `data`: the
    tokens that were known when it was looked up first."""

    __slots__ = ("_hash", "data", "digests", "spans")

    def __init__(self, request: PrefixRequest) -> None:
        self.spans = request.spans
        self.data = np.ascontiguousarray(request.token_ids, "<i4").tobytes()
        self._hash: Any = sha256(b"kernel prefix/1" + sha256(request.identity).digest())
        self.digests = [self._hash.digest()]

    def extend(self, data: bytes, size: int, count: int) -> None:
        """The next `count` blocks of `size` tokens, whose ids are in `data`."""
        step = size * TOKEN
        for at in range(0, count * step, step):
            if self.spans:
                self._enter(len(self.digests) - 1, size)
            self._hash.update(data[at : at + step])
            self.digests.append(self._hash.digest())

    def _enter(self, column: int, size: int) -> None:
        """Media whose positions begin in this column."""
        keys = [[s.start, s.axis, s.key] for s in self.spans if s.start // size == column]
        if keys:
            self._hash = sha256(b"kernel prefix media/1" + self._hash.digest() + sha256(encode(keys)).digest())

    def text_only(self, position: int) -> bool:
        """Do the tokens alone say what is at `position` and after it?"""
        return not self.spans or all(s.stop <= position for s in self.spans)


@dataclass(slots=True)
class Running:
    """A request in a slot; the blocks of its first `done` columns are filled."""

    chain: Chain
    done: int


class Group:
    """What is kept in one KV group. `digests` say by block what it holds (None: nothing that is kept), `places` which block has a
    digest; that counts only while the block still has it. So forgetting a block costs nothing; places that do not count are
    cleared away when they have become many."""

    def __init__(self, group: KVGroup, num_blocks: int) -> None:
        self.window = group.window if group.kind == "window" else None
        self.digests: list[bytes | None] = [None] * num_blocks
        self.places: dict[bytes, int] = {}
        self.idle = IdleBlocks(num_blocks)

    def find(self, digest: bytes) -> int:
        """The block with this content, 0 when there is none."""
        block = self.places.get(digest, 0)
        return block if self.digests[block] == digest else 0

    def keep(self, digests: Sequence[bytes], ids: Sequence[int]) -> list[bool]:
        """Which of these blocks are kept: all but those whose content another one has."""
        places, own, new = self.places, self.digests, []
        for digest, block in zip(digests, ids):
            unknown = own[places.get(digest, 0)] != digest
            if unknown:
                places[digest], own[block] = block, digest
            new.append(unknown)
        if len(places) > 4 * len(own):
            self.places = {digest: place for digest, place in places.items() if own[place] == digest}
        return new

    def forget(self, ids: Sequence[int]) -> list[bytes]:
        """Keep these kept blocks no longer → what they hold."""
        own = self.digests
        held = [own[block] or b"" for block in ids]
        for block in ids:
            own[block] = None
        return held


class HashIndex:
    """Implements `kernel_core.api.PrefixIndex` for groups with one block size, full and window."""

    def __init__(self, groups: Sequence[KVGroup], num_blocks: Sequence[int]) -> None:
        self.block_size = groups[0].block_size
        self._kinds, self._num_blocks = groups, num_blocks
        self._offsets = np.arange(self.block_size)
        self._nothing = tuple(np.zeros(0, np.int32) for _ in groups), (0,) * len(groups)
        self._miss = PrefixHit(0, *self._nothing)
        self._uncopied: list[list[int]] = [[] for _ in groups]
        self.reset()

    def reset(self) -> None:
        self._groups = [Group(group, count) for group, count in zip(self._kinds, self._num_blocks)]
        self._siblings = Siblings(self._num_blocks[0], self.block_size)  # of the first group's blocks
        self._running: dict[int, Running] = {}
        self._next: dict[bytes, int] = {}  # the first block of a prompt that is not filled yet: the slot that is computing it

    # ---- looking up

    def match(self, request: PrefixRequest, recompute: int) -> PrefixHit:
        chain = self._chain(request)
        found = [self._kept(group, chain.digests) for group in self._groups]
        columns = len(found[0]) if len(found) == 1 and self._groups[0].window is None else self._columns(found, recompute)
        owner, until = self._announced(chain.digests, columns)
        copied, common = self._partial(request, chain, columns)
        tokens = columns * self.block_size
        if not tokens + common:
            return PrefixHit(0, *self._nothing, owner, until) if owner >= 0 else self._miss
        first = tuple([self._first(group, tokens - recompute) for group in self._groups])
        ids = tuple([np.array(ids[start:columns] + last, np.int32) for ids, start, last in zip(found, first, copied)])
        return PrefixHit(tokens + common, ids, first, owner, until)

    def _chain(self, request: PrefixRequest) -> Chain:
        if request.memo is None:
            chain = request.memo = Chain(request)
            chain.extend(chain.data, self.block_size, request.token_ids.size // self.block_size)
        return request.memo

    def _kept(self, group: Group, digests: list[bytes]) -> list[int]:
        """The group's blocks by column, up to the first that it lacks; in a window group 0 for those that it lacks."""
        if group.window is not None:
            return [group.find(digest) for digest in islice(digests, 1, None)]
        found = []
        for digest in islice(digests, 1, None):
            block = group.find(digest)
            if not block:
                break
            found.append(block)
        return found

    def _columns(self, found: Sequence[list[int]], recompute: int) -> int:
        """How many leading full blocks can be used in all groups."""
        columns, before = min(map(len, found)), -1
        while columns != before:
            before = columns
            for group, ids in zip(self._groups, found):
                if group.window is not None:
                    columns = self._usable(group, ids, columns, recompute)
        return columns

    def _usable(self, group: Group, ids: list[int], columns: int, recompute: int) -> int:
        """The largest number of columns up to `columns` whose window is there. When a block is missing, everything that
        needs it is passed over at once."""
        at = columns
        while at > 0:
            at -= 1
            if at < self._first(group, columns * self.block_size - recompute):
                return columns
            if not ids[at]:
                columns = at
        return columns

    def _first(self, group: Group, position: int) -> int:
        """The first column that `position` sees."""
        return 0 if group.window is None else max(position - group.window + 1, 0) // self.block_size

    def _announced(self, digests: list[bytes], columns: int) -> tuple[int, int]:
        """A running request that is computing the blocks that follow, and up to which token; -1 and 0 when there is none."""
        owner = self._next.get(digests[columns + 1], -1) if columns + 1 < len(digests) else -1
        if owner < 0:
            return -1, 0
        theirs, until = self._running[owner].chain.digests, columns + 2
        while until < min(len(digests), len(theirs)) and digests[until] == theirs[until]:
            until += 1
        return owner, (until - 1) * self.block_size

    def _partial(self, request: PrefixRequest, chain: Chain, columns: int) -> tuple[list[list[int]], int]:
        """The kept block after `columns` that begins with most of the request's tokens: per group a list with its id, and how
        many tokens."""
        begin = columns * self.block_size
        parent = chain.digests[columns] + chain.data[begin * TOKEN : (begin + ALIKE) * TOKEN]
        if parent not in self._siblings:
            return self._uncopied, 0
        rest, kept = request.token_ids[begin : begin + self.block_size], self._groups[0].digests
        block, common = self._siblings.closest(parent, rest, kept, CANDIDATES)
        digest = kept[block]
        if common and digest is not None and chain.text_only(begin):
            blocks = [group.find(digest) for group in self._groups]
            if all(blocks):
                return [[block] for block in blocks], common
        return self._uncopied, 0

    # ---- running requests

    def opened(self, slot: int, request: PrefixRequest, hit: int) -> None:
        chain, done = self._chain(request), hit // self.block_size
        self._running[slot] = Running(chain, done)
        self._announce(self._running[slot], slot)

    def closed(self, slot: int) -> None:
        running = self._running.pop(slot)
        digests, following = running.chain.digests, running.done + 1
        if following < len(digests) and self._next.get(digests[following]) == slot:
            del self._next[digests[following]]

    def _announce(self, running: Running, slot: int) -> None:
        if running.done + 1 < len(running.chain.digests):
            self._next.setdefault(running.chain.digests[running.done + 1], slot)

    def insert(
        self, slots: np.ndarray, columns: np.ndarray, ids: Sequence[np.ndarray], tokens: np.ndarray
    ) -> Sequence[np.ndarray]:
        size, step, alike = self.block_size, self.block_size * TOKEN, ALIKE * TOKEN
        content = tokens[slots[:, None], (columns * size)[:, None] + self._offsets].astype("<i4", copy=False)
        data, digests, parents = content.tobytes(), [], []
        for at, slot, column in zip(range(0, len(data), step), slots.tolist(), columns.tolist()):
            running = self._running[slot]
            chain = running.chain
            running.done = column + 1
            if column + 1 == len(chain.digests):
                chain.extend(data[at : at + step], size, 1)
            digests.append(chain.digests[column + 1])
            text_only = not chain.spans or chain.text_only(column * size)
            parents.append(chain.digests[column] + data[at : at + alike] if text_only else b"")
        if self._next:
            self._advance(digests)
        kept = [group.keep(digests, blocks.tolist()) for group, blocks in zip(self._groups, ids)]
        self._siblings.tokens[ids[0]] = content
        for parent, block, new in zip(parents, ids[0].tolist(), kept[0]):
            if new:
                self._siblings.put(parent, block)
        return [np.array(new, np.bool_) for new in kept]

    def _advance(self, digests: Sequence[bytes]) -> None:
        """These blocks are filled: the requests that computed them announce the ones that follow."""
        owners = [self._next.pop(digest) for digest in digests if digest in self._next]
        for slot in owners:
            self._announce(self._running[slot], slot)

    # ---- blocks

    def idle(self, group: int, ids: np.ndarray) -> None:
        self._groups[group].idle.add(ids)

    def used(self, group: int, ids: np.ndarray) -> None:
        self._groups[group].idle.remove(ids)

    def evict(self, group: int, count: int) -> tuple[np.ndarray, Sequence[bytes]]:
        ids = self._groups[group].idle.take(count)
        return ids, self._groups[group].forget(ids.tolist())

    def keys(self, request: PrefixRequest) -> Sequence[bytes]:
        return self._chain(request).digests[1:]

    def restore(self, keys: Sequence[bytes], ids: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        kept = [group.keep(keys, blocks.tolist()) for group, blocks in zip(self._groups, ids)]
        for block, new in zip(ids[0].tolist(), kept[0]):
            if new:
                self._siblings.put(b"", block)  # its tokens are not at hand: it is found as a whole only
        return [np.array(new, np.bool_) for new in kept]

    def drop(self, group: int, ids: np.ndarray) -> None:
        self._groups[group].idle.remove(ids)
        self._groups[group].forget(ids.tolist())

    def held(self, group: int) -> np.ndarray:
        return np.array([block for block, digest in enumerate(self._groups[group].digests) if digest is not None], np.int64)
