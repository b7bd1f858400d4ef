"""The index against a model of it: a dict from token prefixes to blocks, under random insert, match, evict, free and reset."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kernel_prefix_caching.idle import IdleBlocks
from kernel_prefix_caching.index import HashIndex, make_index

from kernel_core.api import Capabilities, EngineContext, KVGroup, PrefixIndex, PrefixRequest, Span

B, BLOCKS, SLOTS, LENGTH, WINDOW = 4, 24, 3, 28, 6
FULL, NEAR = KVGroup("full", B, 1, ("f",)), KVGroup("window", B, 1, ("w",), window=WINDOW)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=LENGTH - 8).map(lambda t: np.array(t, np.int32))


def asked(tokens, identity=b""):
    return PrefixRequest("r", np.asarray(tokens, np.int32), identity, ())


class IndexMachine(RuleBasedStateMachine):
    """The twin keeps, per group, {(identity, all tokens up to a block's end): block}; who uses a block; and who became idle
    when."""

    @initialize(groups=st.sampled_from([(FULL,), (FULL, NEAR), (NEAR,)]), recompute=st.integers(1, 3))
    def start(self, groups, recompute):
        self.groups, self.recompute = groups, recompute
        self.index = HashIndex(groups, [BLOCKS] * len(groups))
        self.kept = [{} for _ in groups]
        self.free = [set(range(1, BLOCKS)) for _ in groups]
        self.idle = [[] for _ in groups]  # first evicted first
        self.tokens = np.zeros((SLOTS, LENGTH), np.int32)
        self.stored = {}  # key → content, of blocks that were evicted
        self.slots = {}  # slot → (identity, known, filled columns, blocks by group)

    # ---- the twin's answers

    def covers(self, g, identity, tokens, columns, position):
        """Are the blocks kept that `position` sees, in columns below `columns`?"""
        window = self.groups[g].window
        first = max(position - window + 1, 0) // B if window else 0
        return all((identity, tuple(tokens[: (c + 1) * B])) in self.kept[g] for c in range(first, columns))

    def longest(self, identity, tokens):
        """By trying all lengths: full blocks in all groups, then the longest common part of one more."""
        tokens = tokens.tolist()
        good = [
            c
            for c in range(len(tokens) // B + 1)
            if all(self.covers(g, identity, tokens, c, c * B - self.recompute) for g in range(len(self.groups)))
        ]
        columns = max(good)
        best = columns * B
        for owner, prefix in self.kept[0]:
            block, rest = prefix[columns * B :], tokens[columns * B :]
            if owner != identity or len(prefix) != (columns + 1) * B or list(prefix[: columns * B]) != tokens[: columns * B]:
                continue
            common = next((i for i, (a, b) in enumerate(zip(block, rest)) if a != b), min(len(rest), B))
            if common >= 2 and all((owner, prefix) in kept for kept in self.kept):
                best = max(best, columns * B + common)
        return columns * B, best

    def check_hit(self, identity, tokens, hit):
        full, best = self.longest(identity, tokens)
        assert full <= hit.tokens <= best and (len(self.groups) > 1 or hit.tokens == best)
        for g, group in enumerate(self.groups):
            first, ids = hit.first[g], hit.ids[g].tolist()
            seen = max(hit.tokens // B * B - self.recompute - group.window + 1, 0) // B if group.window else 0
            assert first == seen and first + len(ids) == -(-hit.tokens // B)
            for column, block in enumerate(ids, first):
                content = next(prefix for (owner, prefix), kept in self.kept[g].items() if kept == block and owner == identity)
                end = min((column + 1) * B, hit.tokens)
                assert list(content[:end]) == tokens[:end].tolist(), "another content was matched"

    # ---- operations

    @rule(tokens=TOKENS, identity=st.sampled_from([b"", b"salt"]))
    def match(self, tokens, identity):
        hit = self.index.match(asked(tokens, identity), self.recompute)
        self.check_hit(identity, tokens, hit)
        if hit.owner >= 0:
            owner, known, _, _ = self.slots[hit.owner]
            assert owner == identity and hit.until > hit.tokens // B * B and known[: hit.until] == tokens[: hit.until].tolist()

    @precondition(lambda self: len(self.slots) < SLOTS)
    @rule(tokens=TOKENS, identity=st.sampled_from([b"", b"", b"salt"]))
    def open(self, tokens, identity):
        slot = min(set(range(SLOTS)) - set(self.slots))
        request = asked(tokens, identity)
        hit = self.index.match(request, self.recompute)
        blocks = []
        for g in range(len(self.groups)):
            ids = hit.ids[g][: hit.tokens // B - hit.first[g]]
            blocks.append(dict(enumerate(ids.tolist(), hit.first[g])))
            woken = [block for block in ids.tolist() if block in self.idle[g]]
            if woken:
                self.index.used(g, np.array(woken))
                self.idle[g] = [block for block in self.idle[g] if block not in woken]
        self.index.opened(slot, request, hit.tokens)
        self.tokens[slot, : tokens.size] = tokens
        self.slots[slot] = [identity, tokens.tolist(), hit.tokens // B, blocks]

    @precondition(lambda self: self.slots)
    @rule(data=st.data(), more=st.integers(0, 3), new=st.integers(0, 3))
    def fill(self, data, more, new):
        """Some slots gain tokens and fill columns."""
        rows = sorted(data.draw(st.sets(st.sampled_from(sorted(self.slots)), min_size=1)))
        filled = []
        for slot in rows:
            _, known, done, _ = self.slots[slot]
            known += [1] * min(new, LENGTH - len(known))
            self.tokens[slot, : len(known)] = known
            columns = range(done, min(done + more, len(known) // B))
            filled += [(slot, column) for column in columns]
            self.slots[slot][2] += len(columns)
        if not filled or not all(self.make_room(g, len(filled)) for g in range(len(self.groups))):
            for slot, _ in filled:
                self.slots[slot][2] -= 1
            return
        ids = [[self.free[g].pop() for _ in filled] for g in range(len(self.groups))]
        slots, columns = (np.array(a) for a in zip(*filled))
        kept = self.index.insert(slots, columns, [np.array(i) for i in ids], self.tokens)
        for g, (blocks, keep) in enumerate(zip(ids, kept)):
            for (slot, column), block, new_one in zip(filled, blocks, keep):
                identity, known, _, own = self.slots[slot]
                own[g][column] = block
                assert new_one == ((identity, tuple(known[: (column + 1) * B])) not in self.kept[g])
                if new_one:
                    self.kept[g][identity, tuple(known[: (column + 1) * B])] = block

    def make_room(self, g, count):
        lack = count - len(self.free[g])
        if lack > len(self.idle[g]):
            return False
        if lack > 0:
            ids, keys = self.index.evict(g, lack)
            given = ids.tolist()
            assert given == self.idle[g][:lack], "not the least recently used ones"
            for block, key in zip(given, keys):
                content = next(content for content, kept in self.kept[g].items() if kept == block)
                assert self.index.keys(asked(content[1], content[0]))[-1] == key
                self.stored[key] = content
            self.forget(g, given)
            self.idle[g] = self.idle[g][lack:]
        return True

    def forget(self, g, blocks, free=True):
        self.kept[g] = {key: block for key, block in self.kept[g].items() if block not in blocks}
        self.free[g] |= set(blocks) if free else set()

    @precondition(lambda self: self.stored)
    @rule(data=st.data())
    def restore(self, data):
        key = data.draw(st.sampled_from(sorted(self.stored)))
        groups = range(len(self.groups))
        if not all(self.make_room(g, 1) for g in groups):
            return
        blocks = [self.free[g].pop() for g in groups]
        kept = self.index.restore([key], [np.array([block]) for block in blocks])
        for g, block in enumerate(blocks):
            assert kept[g].tolist() == [self.stored[key] not in self.kept[g]]
            if kept[g][0]:
                self.kept[g][self.stored[key]] = block
                self.idle[g].append(block)
                self.index.idle(g, np.array([block]))
            else:
                self.free[g].add(block)

    def used(self, g, but=None):
        return {block for slot, row in self.slots.items() if slot != but for block in row[3][g].values()}

    @precondition(lambda self: self.slots)
    @rule(data=st.data())
    def close(self, data):
        slot = data.draw(st.sampled_from(sorted(self.slots)))
        for g in range(len(self.groups)):
            blocks = [block for _, block in sorted(self.slots[slot][3][g].items(), reverse=True)]
            blocks = [block for block in blocks if block not in self.used(g, slot)]
            kept = [block for block in blocks if block in self.kept[g].values()]
            self.free[g] |= set(blocks) - set(kept)
            if kept:
                self.index.idle(g, np.array(kept))
                self.idle[g] += kept
        self.index.closed(slot)
        del self.slots[slot]

    @rule(which=st.integers(0, 100))
    def drop(self, which):
        for g in range(len(self.groups)):
            held = sorted(self.kept[g].values())
            if held:
                block = held[which % len(held)]
                self.index.drop(g, np.array([block]))
                self.forget(g, [block], free=block in self.idle[g])
                self.idle[g] = [other for other in self.idle[g] if other != block]

    @rule()
    def reset(self):
        self.index.reset()
        for g in range(len(self.groups)):
            self.free[g] = set(range(1, BLOCKS))
            self.kept[g], self.idle[g] = {}, []
        self.slots = {}

    @invariant()
    def holds_what_the_twin_holds(self):
        if hasattr(self, "index"):
            for g in range(len(self.groups)):
                assert sorted(self.index.held(g).tolist()) == sorted(self.kept[g].values())


QUICK = settings(max_examples=25, stateful_step_count=30, deadline=None, derandomize=True)
LONG = settings(max_examples=1000, stateful_step_count=100, deadline=None, suppress_health_check=list(HealthCheck))
TestIndex = IndexMachine.TestCase
TestIndex.settings = QUICK


@pytest.mark.slow
@pytest.mark.timeout(3000)
class TestIndexFor100000Operations(IndexMachine.TestCase):
    settings = LONG


def test_it_keeps_the_protocol():
    assert isinstance(HashIndex((FULL,), [4]), PrefixIndex)


def filled(index, tokens, slot=0, spans=(), first=1):
    """A request computes all of its full blocks, which get the ids first, first + 1, ..."""
    request = PrefixRequest("r", np.asarray(tokens, np.int32), b"", spans)
    index.opened(slot, request, 0)
    count = len(tokens) // B
    row = np.zeros((slot + 1, LENGTH), np.int32)
    row[slot, : len(tokens)] = tokens
    index.insert(np.full(count, slot), np.arange(count), [np.arange(first, first + count)], row)
    return request


def test_media_are_part_of_every_block_from_their_start_on():
    index = HashIndex((FULL,), [BLOCKS])
    picture = (Span(5, 7, b"cat", 1),)
    tokens = [1, 2, 3, 4, 5, 9, 9, 8, 1, 2, 3, 4, 5]
    filled(index, tokens, spans=picture)

    def hit(spans, given=tokens):
        return index.match(PrefixRequest("q", np.array(given, np.int32), b"", spans), 1).tokens

    assert hit(picture) == 12
    assert hit((Span(5, 7, b"dog", 1),)) == 4 and hit(()) == 4  # and no part of the block is copied either
    assert hit((Span(13, 14, b"dog", 1),)) == 4


def test_later_columns_are_evicted_before_earlier_ones():
    index = HashIndex((FULL,), [BLOCKS])
    filled(index, list(range(12)))
    index.closed(0)
    index.idle(0, np.array([3, 2, 1]))
    assert [index.evict(0, 1)[0].tolist() for _ in range(3)] == [[3], [2], [1]]
    assert index.held(0).size == 0


def test_what_is_being_computed_is_announced_until_it_is_given_up():
    index = HashIndex((FULL,), [BLOCKS])
    request = PrefixRequest("a", np.arange(14, dtype=np.int32), b"", ())
    index.opened(2, request, 0)
    other = asked([*range(9), 0, 0, 0, 0])
    hit = index.match(other, 1)
    assert (hit.tokens, hit.owner, hit.until) == (0, 2, 8)
    row = np.tile(np.arange(LENGTH, dtype=np.int32), (3, 1))
    index.insert(np.array([2]), np.array([0]), [np.array([7])], row)
    hit = index.match(other, 1)
    assert (hit.tokens, hit.owner, hit.until, hit.ids[0].tolist()) == (4, 2, 8, [7])
    index.closed(2)
    assert index.match(other, 1).owner == -1


@given(
    events=st.lists(st.tuples(st.sampled_from(["add", "remove", "take"]), st.sets(st.integers(0, 9), min_size=1)), max_size=80)
)
def test_idle_blocks_leave_in_the_order_in_which_they_came(events):
    idle, twin = IdleBlocks(10), []
    for what, chosen in events:
        if what == "add":
            new = [block for block in chosen if block not in twin]
            twin += new
            if new:
                idle.add(np.array(new))
        elif what == "remove":
            idle.remove(np.array(sorted(chosen)))
            twin = [block for block in twin if block not in chosen]
        else:
            count = min(len(chosen), len(twin))
            assert idle.take(count).tolist() == twin[:count]
            twin = twin[count:]
        assert idle.size == len(twin) and sum(ids.size for _, ids in idle._batches) <= 20
    with pytest.raises(IndexError):
        idle.take(len(twin) + 1)


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ((KVGroup("full", 0, 1, ("f",)),), "smaller than a request"),
        ((FULL, KVGroup("full", 8, 1, ("g",))), "one size"),
        ((FULL, KVGroup("recurrent", B, 1, ("g",))), "kind recurrent"),
    ],
)
def test_where_it_can_find_nothing_it_says_so_and_stays_out(groups, why, caplog):
    sizes = (1, LENGTH, 8, groups, (BLOCKS,) * len(groups))
    context = EngineContext("prefix_caching", "engine", None, None, None, None, Capabilities(), *sizes)
    assert make_index(context) is None and why in caplog.text
