"""Drafters with layers of their own: their KV has no holes, their passes see what they should, and output never changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from toy_worker import BLOCK, Driver, H, ToyAttention, ToyModel, V, make_runner, oracle

from kernel_core.nn.reference_attention import ReferenceAttention

PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(20, 33))]
SAMPLINGS = [{}, {"temperature": 0.9}, {"temperature": 1.2, "top_k": 9, "top_p": 0.9}]
NEW = 14


class Base:
    taps, needs_host, lookback, length = (), False, 0, None

    def opened(self, opened): ...
    def closed(self, slot): ...


def own_paths(module):
    for layer in module.modules():
        if hasattr(layer, "spec"):
            layer.spec = replace(layer.spec, layer=f"drafter.{layer.spec.layer}")
    return module


class Twin(Base):
    """Drafts with the target model itself: every draft must be right, if and only if its KV and positions are."""

    tree = False

    def __init__(self, width, window):
        self.width = self.ahead = width
        self.module = own_paths(ToyModel(window))

    def propose(self, view):
        batch = view.passes.catch_up(0)
        hidden = self.module(batch.forward)[batch.last]
        tokens = [view.passes.draw(self.module.logits(hidden), 0)]
        for number in range(self.width - 1):
            batch = view.passes.advance(tokens[-1], number)
            hidden = self.module(batch.forward)
            tokens.append(view.passes.draw(self.module.logits(hidden), number + 1))
        return chain(torch.stack(tokens, 1))


def chain(tokens):
    rows, width = tokens.shape
    return tokens, torch.arange(-1, width - 1, dtype=torch.int32).repeat(rows, 1), torch.full((rows,), width)


class TwinTree(Twin):
    """Two children of every node on the best path, the better one second; only the whole tree's passes find the path."""

    tree = True

    def __init__(self, levels, window):
        super().__init__(2 * levels, window)
        self.levels, self.ahead = levels, 2 * levels + 1

    def propose(self, view):
        batch = view.passes.catch_up(0)
        best = self.module.logits(self.module(batch.forward)[batch.last]).topk(2).indices
        rows = len(best)
        tokens, parents = torch.full((rows, 2 * self.levels), -1), torch.full((rows, 2 * self.levels), -1, dtype=torch.int32)
        for level in range(self.levels):
            tokens[:, 2 * level], tokens[:, 2 * level + 1] = best[:, 1], best[:, 0]
            parents[:, 2 * level : 2 * level + 2] = 2 * level - 1
            nodes = 2 * level + 2
            batch = view.passes.expand(tokens[:, :nodes], parents[:, :nodes])
            hidden = self.module(batch.forward).view(rows, nodes, H)
            best = self.module.logits(hidden[:, -1]).topk(2).indices
        return tokens, parents, torch.full((rows,), 2 * self.levels)


def run(drafter, layers, *, window=5, depth=1, chunk=1000, samplings=SAMPLINGS):
    runner = make_runner(ToyModel(window), width=drafter.width, ahead=drafter.ahead, drafter=drafter, layers=layers)
    driver = Driver(runner, width=drafter.width, ahead=drafter.ahead, depth=depth, chunk=chunk)
    toys = [driver.add(p, NEW, key=500 + i, **s) for i, (p, s) in enumerate(zip(PROMPTS, samplings))]
    driver.run()
    for toy in toys:
        assert toy.out == oracle(toy.prompt, NEW, toy.sampling, toy.key, window=window)
    return driver, toys


@pytest.mark.parametrize(("depth", "chunk"), [(1, 1000), (1, 3), (2, 1000), (2, 3)])
@pytest.mark.parametrize("window", [None, 5])
def test_the_target_as_its_own_drafter_is_always_right(window, depth, chunk):
    drafter = Twin(3, window)
    _, toys = run(drafter, drafter.module, window=window, depth=depth, chunk=chunk)
    for toy in toys[:2]:  # greedy, and random without filters; drafts do not go through filters
        assert toy.drafted > 0
        assert toy.accepted == toy.drafted or depth == 2  # a plan ahead of its result may carry drafts past the end
        assert toy.accepted > 0.8 * toy.drafted


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("window", [None, 2, 5])
def test_trees_find_the_greedy_path(window, depth):
    drafter = TwinTree(3, window)
    _, toys = run(drafter, drafter.module, window=window, depth=depth, samplings=[{}, {}, {}])
    for toy in toys:
        assert toy.accepted >= 0.4 * toy.drafted  # three of six, but for trees cut off at the end


# ---- layers that store (state i - 1, token i) in slot i


class Head(nn.Module):
    def __init__(self, model):
        super().__init__()
        torch.manual_seed(3)
        self.model = [model]
        self.fc = nn.Linear(2 * H, H, bias=False)
        self.attention = ToyAttention("head", None, ReferenceAttention())
        self.attention.spec = replace(self.attention.spec, layer="drafter.head", first_slot=1)
        for p in self.parameters():
            p.requires_grad_(False).normal_(0, 0.2)

    def mix(self, tokens, states):
        return self.fc(torch.cat([self.model[0].table(tokens), states], -1))

    def forward(self, fwd, states):
        return self.attention(self.mix(fwd.token_ids, states), fwd)

    def dense(self, tokens, states):
        """[n] tokens and [n - 1] target states → [n - 1, H]: slot i from (state i - 1, token i), slots 1 to i seen."""
        x = self.mix(torch.tensor(tokens[1:]), states)
        return self.attention.dense(x)


def target_states(model, tokens):
    x = model.table(torch.tensor(tokens)) + model.place(torch.arange(len(tokens)))
    for layer in model.layers:
        x = layer.dense(x)
    return x


class Heads(Base):
    """Drafts by the head; keeps what it computed for every row's newest token, to be compared."""

    lookback = 1

    def __init__(self, width, tree):
        self.width, self.tree, self.ahead = width, tree, width + 1
        self.target = ToyModel(5)
        self.module = Head(self.target)
        self.seen = []

    def propose(self, view):
        batch = view.passes.catch_up(1)
        hidden = self.module(batch.forward, view.hidden[batch.source])[batch.last]
        for row, slot in enumerate(view.step.rows.tolist()):
            if view.host_sampled[row]:
                known = int(view.known[row])
                self.seen.append((slot, view.step.history[slot, :known].tolist(), hidden[row].clone()))
        assert (batch.row[batch.last] == torch.arange(len(view.known))).all()
        known = zip(view.step.rows.tolist(), view.known.tolist())
        future = torch.tensor([(self.future[slot] + [0] * 20)[count : count + self.width] for slot, count in known])
        tokens, parents, count = chain(future)
        if self.tree:  # the right path is every second node
            tokens, parents = tokens.repeat_interleave(2, 1)[:, : self.width], parents.clone()
            tokens[:, 0::2] = (tokens[:, 0::2] + 1) % V
            parents[:] = torch.tensor([2 * (j // 2) - 1 for j in range(self.width)], dtype=torch.int32)
        return tokens, parents, count


@pytest.mark.parametrize(("depth", "chunk"), [(1, 1000), (1, 3), (2, 3)])
@pytest.mark.parametrize("tree", [False, True])
def test_a_head_over_states_and_next_tokens_computes_its_formula(tree, depth, chunk):
    drafter = Heads(4, tree)
    runner = make_runner(drafter.target, width=4, ahead=5, drafter=drafter, layers=drafter.module)
    driver = Driver(runner, width=4, ahead=5, depth=depth, chunk=chunk)
    toys = [driver.add(p, NEW, key=500 + i, **s) for i, (p, s) in enumerate(zip(PROMPTS, SAMPLINGS))]
    drafter.future = {t.slot: t.prompt + oracle(t.prompt, NEW, t.sampling, t.key) for t in toys}
    driver.run()
    assert [t.out for t in toys] == [drafter.future[t.slot][len(t.prompt) :] for t in toys]
    assert all(t.accepted for t in toys)
    for slot, tokens, hidden in drafter.seen:
        if len(tokens) < len(drafter.future[slot]):
            states = target_states(drafter.target, tokens[:-1])
            torch.testing.assert_close(hidden, drafter.module.dense(tokens, states)[-1], atol=2e-5, rtol=1e-4)
    assert len(drafter.seen) > 3 * len(toys)


def test_recomputed_positions_write_nothing():
    """A plan's `write_from` holds for the drafter's layers as for the model's: shared blocks stay as they are."""
    drafter = Twin(2, None)
    runner = make_runner(ToyModel(None), width=2, ahead=2, drafter=drafter, layers=drafter.module)
    driver = Driver(runner, width=2, ahead=2)
    driver.add(list(range(1, 10)), 4)
    plan = driver.plan()
    runner.submit(replace(plan, write_from=np.full(1, 8, np.int32))).result()
    written = runner.kv.kv["drafter.layers.0"][0].flatten(1).any(1).nonzero().flatten()
    assert written.tolist() == [BLOCK + p for p in range(8, 11)]  # token 8, the new one, and the first draft
