"""The step's small arrays, made on the host, are those of the kernel's own parts: every array of every step of real workloads."""

from collections import Counter
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from kernel_cpu.device import CpuDevice
from kernel_cpu.steps import HostAcceptance, HostDrafting, HostInputs, HostPasses
from steady_workload import REQUESTS, greedy, random, run_all

from kernel_core import Engine
from kernel_core.nn.api import Acceptance, Drafting, Passes, StepInputBuilder

REPEATS = {"ngram": {"draft_tokens": 4, "adaptive": False}}
EAGLE = {"eagle": {"head": "tiny-chat-eagle3", "adaptive": False}}
DRAFT_MODEL = {"draft_model": {"model": "tiny-draft", "draft_tokens": 3, "adaptive": False}}
TREE = {"eagle": {"head": "tiny-chat-eagle3", "adaptive": False, "tree": True, "draft_tokens": 5}}
LONG = list(range(40, 90))


def same(one, other, where="step"):
    """Are two values made of the same arrays, dtypes included? What both point to (KV, the plan) is the same object."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other), where
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


class Inputs(HostInputs):
    def build(self, plan):
        got = super().build(plan)
        same(StepInputBuilder.build(self, plan), got)
        SEEN["steps"] += 1
        SEEN["drafts"] += int((got.view.drafts >= 0).sum())
        SEEN["absent"] += int((np.maximum(plan.room - 1, 0)).sum() - (got.view.drafts >= 0).sum())
        SEEN["chunks"] += int((plan.room == 0).sum())
        SEEN["masked"] += int((plan.write_from > plan.start).sum())
        return got


def state(slots):
    return {name: getattr(slots, name).clone() for name in ("tokens", "known", "computed", "drafts", "parents")}


def put(slots, kept):
    for name, value in kept.items():
        getattr(slots, name).copy_(value)


def entered(slots):
    return state(slots) | {"tokens": slots.tokens[:, :-1].clone()}  # the last column takes what is not kept


class Accepting(HostAcceptance):
    def __call__(self, step, sampled):
        if self.tree and step.layout.width:  # the kernel's, which moves KV: it can't be done twice
            got = super().__call__(step, sampled)
            SEEN["accepted"] += int(got.accepted.sum())
            return got
        before = state(self.slots)
        expected = Acceptance.__call__(self, step, sampled)
        wanted, report = entered(self.slots), Acceptance.report(self, step, expected, None)
        put(self.slots, before)
        got = super().__call__(step, sampled)
        same(wanted, entered(self.slots))
        counted = torch.arange(got.tokens.shape[1]) < got.count[:, None]
        for verified in (expected, got):
            verified.tokens = torch.where(counted, verified.tokens, -1)
        same(expected, got, "verified")
        same(report, super().report(step, got, None) | {"tokens": report["tokens"]}, "report")
        SEEN["accepted"] += int(got.accepted.sum())
        return got


class Offering(HostDrafting):
    def view(self, step, verified, hidden, taps):
        got = super().view(step, verified, hidden, taps)
        expected = Drafting.view(self, step, verified, hidden, taps)
        same(expected, got, "view")
        if not self.tree:
            assert type(got.passes) is HostPasses and type(expected.passes) is Passes
        some = torch.arange(len(got.known)) % 3 - 1
        for one in ("catch_up", 0), ("catch_up", 1), ("advance", some, 0), ("advance", some, 2):
            if self.layers:
                made = [getattr(view.passes, one[0])(*one[1:]) for view in (expected, got)]
                same(*made, f"{one[0]} {one[1:]}")
                SEEN[one[0]] += 1
        return got

    def keep(self, view, tokens, parents, count):
        before = state(self.slots)
        expected, wanted = Drafting.keep(self, view, tokens, parents, count), None
        wanted = state(self.slots)
        put(self.slots, before)
        got = super().keep(view, tokens, parents, count)
        same(wanted, state(self.slots))
        assert got.tolist() == expected.tolist()
        return got


SEEN: Counter = Counter()
PARTS = {"step_inputs": Inputs, "acceptance": Accepting, "drafting": Offering, "steady": lambda runner: None}
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


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_every_array_is_the_kernels(options, monkeypatch):
    SEEN.clear()
    ordinary = CpuDevice.runner_parts
    monkeypatch.setattr(CpuDevice, "runner_parts", lambda device: ordinary(device) | PARTS)
    keys = {"device": "cpu", "max_model_len": 96, "max_requests": 5} | options
    with Engine(model="tiny-chat", **keys) as engine:
        for requests in (REQUESTS | OTHERS).values():
            run_all(engine, requests)
    assert SEEN["steps"] > 50
    if options.get("plugins"):
        assert SEEN["drafts"] > 50 and SEEN["accepted"] > 5
        assert SEEN["catch_up"] > 50 or options["plugins"] is REPEATS
    if options.get("plugins") is EAGLE:
        assert SEEN["masked"] > 0
    if "max_tokens_per_step" in options:
        assert SEEN["chunks"] > 3
    if options.get("overlap"):
        assert SEEN["absent"] > 0
