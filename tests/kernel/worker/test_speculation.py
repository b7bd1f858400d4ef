"""Drafts change speed, never output: chains and trees, right, wrong and absent, greedy and sampled, plain and overlapped."""

import numpy as np
import pytest
import torch
from toy_worker import Driver, ToyModel, V, make_runner, oracle

from kernel_core.nn.verify import verify

PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(20, 33))]
SAMPLINGS = [{}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 9, "top_p": 0.9}]
NEW = 14


class ScriptedDrafter:
    """Knows each request's true continuation and drafts it in a scripted way. `shape`: chain or tree, `truth`: "right",
    "wrong", "half" (right first, wrong later), "absent" (sometimes nothing)."""

    taps, lookback, needs_host, length = (), 1, False, None

    def __init__(self, width: int, tree: bool, truth: str):
        self.width, self.tree, self.truth = width, tree, truth
        self.future: dict[int, list[int]] = {}

    def opened(self, opened): ...
    def closed(self, slot): ...

    def propose(self, view):
        rows, m = view.step.rows.tolist(), self.width
        tokens = torch.full((len(rows), m), -1)
        parents = torch.arange(-1, m - 1, dtype=torch.int32).repeat(len(rows), 1)
        count = torch.zeros(len(rows), dtype=torch.int32)
        for r, slot in enumerate(rows):
            known = int(view.step.known[slot])
            assert view.last_token[r] == view.step.history[slot, known - 1]
            ahead = (self.future[slot] + [0] * 50)[known:]
            for d, (token, parent) in enumerate(self.draft(ahead, known)):
                tokens[r, d], parents[r, d] = token, parent
                count[r] = d + 1
        return tokens, parents, count

    def draft(self, ahead, known):
        m = self.width
        if self.truth == "absent" and known % 3:
            return []
        if self.tree:
            return self.branches(ahead)[:m]
        good = {"right": m, "wrong": 0, "half": m // 2, "absent": m - 1}[self.truth]
        return [(ahead[d] if d < good else (ahead[d] + 1) % V, d - 1) for d in range(m)]

    def branches(self, ahead):
        """A wrong and a right child at every level, the wrong one first; the right path is 1, 3, 5, ..."""
        nodes, parent = [], -1
        for level in range(self.width // 2 + 1):
            good = self.truth in ("right", "absent") or (self.truth == "half" and level < 2)
            nodes += [((ahead[level] + 1) % V, parent), (ahead[level] if good else (ahead[level] + 2) % V, parent)]
            parent = len(nodes) - 1
        return nodes


def run(drafter=None, width=0, depth=1, chunk=1000, window=5, **options):
    model = ToyModel(window)
    driver = Driver(make_runner(model, width=width, drafter=drafter), width=width, depth=depth, chunk=chunk)
    toys = [driver.add(p, NEW, key=500 + i, **s, **options) for i, (p, s) in enumerate(zip(PROMPTS, SAMPLINGS))]
    if drafter is not None:
        drafter.future = {t.slot: t.prompt + oracle(t.prompt, NEW, t.sampling, t.key, window=window) for t in toys}
    driver.run()
    return driver, toys


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("truth", ["right", "wrong", "half", "absent"])
@pytest.mark.parametrize("tree", [False, True])
def test_output_is_the_plain_engines(tree, truth, depth):
    plain, wanted = run()
    fast, toys = run(ScriptedDrafter(5, tree, truth), width=5, depth=depth)
    assert [t.out for t in toys] == [t.out for t in wanted]
    if truth == "right":
        assert sum(t.accepted for t in toys) > sum(t.drafted for t in toys) * (0.3 if tree else 0.9)
        assert depth > 1 or fast.steps <= plain.steps / 2
    if truth == "wrong":
        assert sum(t.accepted for t in toys) == 0 < sum(t.drafted for t in toys)


@pytest.mark.parametrize("window", [None, 2, 3])
def test_trees_see_windows_by_logical_position(window):
    """A window smaller than the tree: places and positions differ most here."""
    _, toys = run(ScriptedDrafter(8, True, "right"), width=8, window=window)
    assert [t.out for t in toys] == [oracle(t.prompt, NEW, t.sampling, t.key, window=window) for t in toys]
    assert all(t.accepted for t in toys)


@pytest.mark.parametrize("tree", [False, True])
def test_logprobs_are_those_of_the_tokens_kept(tree):
    _, plain = run(logprobs=3)
    _, toys = run(ScriptedDrafter(4, tree, "half"), width=4, logprobs=3)
    for toy, other in zip(toys, plain):
        kept = {position: rest for position, *rest in toy.logprobs}
        for position, ids, values, rank in other.logprobs:
            assert kept[position][0].tolist() == ids.tolist() and kept[position][2] == rank
            np.testing.assert_allclose(kept[position][1], values, atol=1e-5)


def test_a_tree_walk_by_hand():
    #        last ── 0(a) ── 1(b) ── 3(d)
    #            └── 2(c) ── 4(e)
    drafts, parents = torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[-1, 0, -1, 1, 2]])
    draws = torch.tensor([[12, 0, 0, 14, 0, 99]])  # after last: 12 = c; after c: 14 = e; after e: 99
    got = verify(drafts, parents, draws, torch.zeros(1, 6, dtype=torch.bool), torch.tensor([True]))
    assert got.tokens[0, : got.count].tolist() == [12, 14, 99]
    assert got.path.tolist() == [[2, 4, -1, -1, -1]] and got.accepted.tolist() == [2]


def test_only_bad_places_on_the_accepted_path_break_a_row():
    drafts, parents = torch.tensor([[5, 6], [5, 6]]), torch.tensor([[-1, 0], [-1, 0]])
    draws = torch.tensor([[5, 1, 9], [4, 5, 9]])
    bad = torch.tensor([[False, True, False], [False, True, False]])
    assert verify(drafts, parents, draws, bad, torch.ones(2, dtype=torch.bool)).bad.tolist() == [True, False]


def test_absent_drafts_and_unsampled_rows_gain_nothing_by_accident():
    drafts, parents = torch.tensor([[-1, 6], [5, 6]]), torch.tensor([[-1, 0], [-1, 0]])
    draws = torch.tensor([[-1, 6, 9], [5, 6, 9]])
    got = verify(drafts, parents, draws, torch.zeros(2, 3, dtype=torch.bool), torch.tensor([True, False]))
    assert got.count.tolist() == [1, 0] and got.accepted.tolist() == [0, 0]


def test_absent_drafts_are_computed_but_not_written():
    """After two real drafts of four, the cache ends with the last known token and those two."""
    drafter = ScriptedDrafter(4, False, "right")
    runner = make_runner(width=4, drafter=drafter)
    driver = Driver(runner, width=4)
    toy = driver.add([3, 1, 4, 1, 5], 12)
    drafter.future = {0: [*toy.prompt, *oracle(toy.prompt, 12, toy.sampling)]}
    drafter.draft = lambda ahead, known: [(ahead[0], -1), (ahead[1], 0)]
    driver.step()
    driver.step()
    written = runner.kv.kv["layers.0"][0].flatten(1).any(1).nonzero().flatten()
    assert written.tolist() == [4 + p for p in range(5 + 1 + 2)]
    assert toy.drafted == toy.accepted == 2
