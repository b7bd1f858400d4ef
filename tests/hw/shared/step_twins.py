"""Runner parts beside the kernel's own: every array that they make in a run must be the kernel's."""

from dataclasses import fields, is_dataclass

import numpy as np
import torch
from steady_workload import greedy, random, run_all

from kernel_core import Engine
from kernel_core.nn.api import Acceptance, Drafting, Passes, StepInputBuilder

REPEATS = {"ngram": {"draft_tokens": 4, "adaptive": False}}
EAGLE = {"eagle": {"head": "tiny-chat-eagle3", "adaptive": False}}
DRAFT_MODEL = {"draft_model": {"model": "tiny-draft", "draft_tokens": 3, "adaptive": False}}
TREE = {"eagle": {"head": "tiny-chat-eagle3", "adaptive": False, "tree": True, "draft_tokens": 5}}
LONG = list(range(40, 90))
OTHERS = {
    "repeating": [([7, 8, 9] * 9, greedy(max_tokens=20)), ([1, 2] * 20, random(max_tokens=9)), (LONG, random(max_tokens=5))],
    "prefixes": [([*LONG, 1], greedy(max_tokens=4)), ([*LONG, 2], greedy(max_tokens=8)), (LONG, random(max_tokens=8))],
    "to the last position": [([1, 2, 3], greedy(max_tokens=93)), (list(range(50)), random(max_tokens=46))],
}
ENGINES = {
    "plain": {},
    "repeats": {"plugins": REPEATS},
    "eagle": {"plugins": EAGLE},
    "draft model": {"plugins": DRAFT_MODEL},
    "tree": {"plugins": TREE},
    "overlapped": {"plugins": REPEATS, "overlap": True},
    "preempting": {"plugins": EAGLE, "kv_blocks": 12},
    "chunks": {"plugins": DRAFT_MODEL, "max_tokens_per_step": 24},
}


def same(one, other, where="step"):
    """Are two values made of the same arrays, dtypes included? What both point to (KV, the plan) is the same object."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
    elif hasattr(one, "batch"):  # an attention plan
        same(one.batch, other.batch, where)
    elif is_dataclass(one):
        for field in fields(one):
            if field.name not in ("plan", "kv", "passes"):
                same(getattr(one, field.name), getattr(other, field.name), f"{where}.{field.name}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            same(a, b, f"{where}[{index}]")
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key, value in one.items():
            same(value, other[key], f"{where}.{key}")
    else:
        assert one == other, where


def state(slots):
    return {name: getattr(slots, name).clone() for name in ("tokens", "known", "computed", "drafts", "parents")}


def put(slots, kept):
    for name, value in kept.items():
        getattr(slots, name).copy_(value)


def entered(slots):
    return state(slots) | {"tokens": slots.tokens[:, :-1].clone()}  # the last column takes what is not kept


def twins(inputs, acceptance, drafting, seen):
    """The parts, which check themselves; `seen` counts what there was to be checked."""

    class Inputs(inputs):
        def build(self, plan):
            got = super().build(plan)
            same(StepInputBuilder.build(self, plan), got)
            there = int((got.view.drafts >= 0).sum())
            seen.update(steps=1, drafts=there, absent=int(np.maximum(plan.room - 1, 0).sum()) - there)
            seen.update(chunks=int((plan.room == 0).sum()), masked=int((plan.write_from > plan.start).sum()))
            return got

    class Accepting(acceptance):
        def __call__(self, step, sampled):
            if self.tree and step.layout.width:  # the kernel's, which moves KV: it can't be done twice
                got = super().__call__(step, sampled)
                seen["accepted"] += int(got.accepted.sum())
                return got
            before = state(self.slots)
            expected = Acceptance.__call__(self, step, sampled)
            wanted, report = entered(self.slots), Acceptance.report(self, step, expected, None)
            put(self.slots, before)
            got = super().__call__(step, sampled)
            same(wanted, entered(self.slots))
            counted = torch.arange(got.tokens.shape[1], device=got.count.device) < got.count[:, None]
            made = super().report(step, got, None)
            assert torch.equal(made["tokens"][counted], report["tokens"][counted])
            same(report, made | {"tokens": report["tokens"]}, "report")
            for verified in (expected, got):
                verified.tokens = torch.where(counted, verified.tokens, -1)
            same(expected, got, "verified")
            seen["accepted"] += int(got.accepted.sum())
            return got

    class Offering(drafting):
        def view(self, step, verified, hidden, taps):
            got, expected = super().view(step, verified, hidden, taps), Drafting.view(self, step, verified, hidden, taps)
            same(expected, got, "view")
            assert (type(got.passes) is Passes) == self.tree
            some = torch.arange(len(got.known), device=got.known.device) % 3 - 1
            logits = torch.sin(torch.arange(len(some) * 50, device=some.device) ** 2.0).view(-1, 50) * 4
            if not self.tree:
                for number in (2, some + 1):
                    assert torch.equal(expected.passes.draw(logits, number), got.passes.draw(logits, number))
            for one in ("catch_up", 0), ("catch_up", 1), ("advance", some, 0), ("advance", some, 2):
                if self.layers:
                    same(*(getattr(view.passes, one[0])(*one[1:]) for view in (expected, got)), f"{one[0]} {one[1:]}")
                    seen[one[0]] += 1
            return got

        def keep(self, view, tokens, parents, count):
            before, expected = state(self.slots), Drafting.keep(self, view, tokens, parents, count)
            wanted = state(self.slots)
            put(self.slots, before)
            got = super().keep(view, tokens, parents, count)
            same(wanted, state(self.slots))
            assert got.tolist() == expected.tolist()
            return got

    return {"step_inputs": Inputs, "acceptance": Accepting, "drafting": Offering}


def check(options, seen, workloads):
    """Run them on a device whose parts are twins, and look whether there was enough to be checked."""
    with Engine(model="tiny-chat", **({"device": "cpu", "max_model_len": 96, "max_requests": 5} | options)) as engine:
        for requests in workloads:
            run_all(engine, requests)
    assert seen["steps"] > 20
    if options.get("plugins"):
        assert seen["drafts"] > 20 and seen["accepted"] > 3
        assert seen["catch_up"] > 50 or options["plugins"] is REPEATS
    if options.get("plugins") is EAGLE:
        assert seen["masked"] > 0
    if "max_tokens_per_step" in options:
        assert seen["chunks"] > 3
    if options.get("overlap"):
        assert seen["absent"] > 0
