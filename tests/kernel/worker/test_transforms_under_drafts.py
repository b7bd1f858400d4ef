"""The real penalties and rules in the runner: alone, in a mixed batch, and under chain and tree drafts, against the formulas."""

import numpy as np
import pytest
import torch
from kernel_logit_rules.ban import ban
from kernel_logit_rules.request import Rules
from kernel_logit_rules.transform import BiasRule, MaskRule
from kernel_penalties.penalise import Penalise
from kernel_penalties.transform import Penalties
from test_speculation import ScriptedDrafter
from toy_worker import CPU, Driver, V, make_runner, oracle

from kernel_core.wire import encode

NEW = 16
PROMPTS = [[3, 1, 4, 1, 5], [9], [7, 7, 8]]
SAMPLINGS = [{}, {"temperature": 0.9}, {"temperature": 1.1, "top_k": 12}]
PENALTY = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
BAD = [[5], [12, 13], [13, 14, 15], [2, 40]]
BIAS = {4: 1.5, 12: 2.0, 13: 2.0}
STOPS, MIN_TOKENS = [6, 13], 5


def rules(**changed) -> Rules:
    given = {
        "allowed": list(range(45)),
        "bad": [np.array(ids, np.int32) for ids in BAD],
        "until": MIN_TOKENS,
        "stops": STOPS,
        "bias_ids": list(BIAS),
        "bias": list(BIAS.values()),
        **changed,
    }
    arrays = {k: np.array(v, np.float32 if k == "bias" else np.int32) for k, v in given.items() if k not in ("bad", "until")}
    return Rules(**{**given, **arrays})


def change(logits, prompt, output):
    """Allowed ids, bad words, min tokens, then the biases, then the penalties: the definitions, one token at a time."""
    masked = set(range(45, V))
    masked |= {ids[-1] for ids in BAD if len(ids) == 1 or output[1 - len(ids) :] == ids[:-1]}
    masked |= set(STOPS) if len(output) < MIN_TOKENS else set()
    logits[list(masked)] = -np.inf
    for token, bias in BIAS.items():
        logits[token] += bias
    for token in set(prompt) | set(output):
        r = PENALTY["repetition_penalty"]
        logits[token] = logits[token] / r if logits[token] > 0 else logits[token] * r
    for token in set(output):
        logits[token] -= PENALTY["frequency_penalty"] * output.count(token) + PENALTY["presence_penalty"]
    return logits


def run(drafter=None, width=0, depth=1):
    transforms = [
        Penalties("penalties", 8, CPU, Penalise()),
        BiasRule("logit_rules"),
        MaskRule("logit_rules", V, CPU, ban),
    ]
    runner = make_runner(width=width, drafter=drafter, transforms=transforms)
    driver = Driver(runner, width=width, depth=depth)
    payloads = {"penalties": encode(PENALTY), "logit_rules": encode(rules())}
    toys = [driver.add(p, NEW, key=80 + i, payloads=payloads, **s) for i, (p, s) in enumerate(zip(PROMPTS, SAMPLINGS))]
    toys.append(driver.add([9], NEW, key=3))  # a request without any
    truth = [oracle(t.prompt, NEW, t.sampling, t.key, change if t.payloads else None) for t in toys]
    if drafter is not None:
        drafter.future = {t.slot: t.prompt + out for t, out in zip(toys, truth)}
    driver.run()
    return toys, truth


def test_the_formulas_hold_in_a_mixed_batch():
    toys, truth = run()
    assert [t.out for t in toys] == truth
    assert truth[1] != truth[3]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("truth", ["right", "half", "wrong"])
@pytest.mark.parametrize("tree", [False, True])
def test_drafts_before_a_row_count_as_output(tree, truth, depth):
    toys, expected = run(ScriptedDrafter(5, tree, truth), width=5, depth=depth)
    assert [t.out for t in toys] == expected
    assert truth == "wrong" or all(t.accepted for t in toys)


class HostRule:
    """Allows only tokens of one parity, alternating with every output token: a grammar in the smallest form."""

    stage, host, argmax_invariant = "mask", True, False

    def __init__(self):
        self.count = {}

    def opened(self, opened):
        self.count[opened.slot] = 0
        return "grammar" in opened.payloads

    def closed(self, slot):
        del self.count[slot]

    def apply(self, logits, step):
        raise AssertionError("a host transform is never applied on the device")

    def fill(self, turn):
        for i, slot in enumerate(turn.slots.tolist()):
            self.count[slot] += len(turn.tokens[i])
            depth = {-1: 0}
            for d, (draft, parent) in enumerate(zip(turn.drafts[i], turn.parents[i])):
                depth[d] = depth[int(parent)] + 1 if draft >= 0 else 0
            for row in range(turn.mask.shape[1]):
                parity = (self.count[slot] + depth[row - 1]) % 2
                turn.mask[i, row] = np.uint32(0xAAAAAAAA if parity else 0x55555555)


class FailsLater(HostRule):
    def fill(self, turn):
        super().fill(turn)
        turn.failed.update({slot: "the rule has no way on" for slot in turn.slots.tolist() if self.count[slot] >= 3})


def by_parity(logits, prompt, output):
    logits[np.arange(V) % 2 != len(output) % 2] = -np.inf
    return logits


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("tree", [None, False, True])
def test_a_host_transform_follows_tokens_drafts_and_parents(tree, depth):
    drafter = None if tree is None else ScriptedDrafter(5, tree, "half")
    width = 5 if drafter else 0
    driver = Driver(make_runner(width=width, drafter=drafter, transforms=[HostRule()]), width=width, depth=depth)
    toys = [driver.add(p, NEW, key=80 + i, payloads={"grammar": b""}, **s) for i, (p, s) in enumerate(zip(PROMPTS, SAMPLINGS))]
    toys.append(driver.add([9], NEW, key=3))
    truth = [oracle(t.prompt, NEW, t.sampling, t.key, by_parity if t.payloads else None) for t in toys]
    if drafter:
        drafter.future = {t.slot: t.prompt + out for t, out in zip(toys, truth)}
    driver.run()
    assert [t.out for t in toys] == truth


@pytest.mark.parametrize("depth", [1, 2])
def test_a_host_transform_ends_a_request_with_its_reason(depth):
    driver = Driver(make_runner(transforms=[FailsLater()]), depth=depth)
    broken = driver.add([1, 2], 8, payloads={"grammar": b""})
    other = driver.add([9], 8)
    driver.run()
    assert broken.failed == "the rule has no way on" and len(broken.out) == 3
    assert other.out == oracle([9], 8, other.sampling)
    again = driver.add([1, 2], 3, payloads={"grammar": b""})
    driver.run()
    assert again.failed is None and len(again.out) == 3


def test_a_step_without_watched_slots_calls_no_transform():
    class Counting(HostRule):
        host, calls = False, 0

        def apply(self, logits, step):
            self.calls += 1
            return logits

    rule = Counting()
    driver = Driver(make_runner(transforms=[rule]))
    driver.add([1, 2], 4)
    driver.run()
    assert rule.calls == 0
    driver.add([1, 2], 4, payloads={"grammar": b""})
    driver.run()
    assert rule.calls == 4


def test_all_masked_ends_that_request_only():
    nothing = rules(allowed=[5])  # the only allowed token is a bad word
    driver = Driver(make_runner(transforms=[MaskRule("logit_rules", V, CPU, ban)]))
    broken = driver.add([1, 2], 6, payloads={"logit_rules": encode(nothing)})
    other = driver.add([9], 6)
    driver.run()
    assert "no token is allowed" in broken.failed and broken.out == []
    assert other.out == oracle([9], 6, other.sampling)
    assert torch.get_num_threads() == 1
