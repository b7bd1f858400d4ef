"""The runner gives what one dense forward a token gives: batched, chunked, overlapped, greedy and sampled; and it does no
more than the plan says."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_logit_rules.ban import ban
from kernel_logit_rules.request import Rules
from kernel_logit_rules.transform import BiasRule, MaskRule
from kernel_penalties.penalise import Penalise
from kernel_penalties.transform import Penalties
from torch.utils._python_dispatch import TorchDispatchMode
from toy_worker import CPU, Driver, ToyModel, V, make_runner, oracle

from kernel_core.errors import ConfigError, PluginError
from kernel_core.nn.protocols import Forward
from kernel_core.plan import PROMPT_LOGPROBS, Copies, Job, SamplingRow, StepPlan
from kernel_core.wire import encode

PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(20, 33)), [7, 7]]
SAMPLINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.05},
]
NONE = np.zeros(0, np.int32)
PENALTY = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1}
IDS = np.array([4, 5], np.int32)
RULES = Rules(np.arange(40, dtype=np.int32), [IDS, IDS[:1]], 3, IDS, IDS, np.ones(2, np.float32))


def empty_plan(**changed) -> StepPlan:
    return StepPlan(**{"plan_id": 0, **dict.fromkeys(("rows", "start", "q", "room", "write_from", "flags"), NONE), **changed})


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(chunk, depth):
    driver = Driver(make_runner(ToyModel()), chunk=chunk, depth=depth)
    toys = [driver.add(p, 10, key=77 + i, **s) for i, (p, s) in enumerate(zip(PROMPTS, SAMPLINGS))]
    assert driver.run() == [oracle(t.prompt, 10, t.sampling, t.key) for t in toys]


def test_a_slot_taken_again_remembers_nothing():
    driver = Driver(make_runner(slots=1))
    first = driver.add(PROMPTS[2], 6, key=5, temperature=1.5, top_k=3)
    driver.run()
    driver.close(first)
    second = driver.add(PROMPTS[0], 6, slot=0)
    driver.run()
    assert second.out == oracle(second.prompt, 6, second.sampling)


def test_a_preempted_request_goes_on_where_it_was():
    """Opened again with its output as known tokens, in another slot: the draws are functions of key and position."""
    driver = Driver(make_runner())
    whole = oracle([3, 1, 4], 12, SamplingRow(temperature=1.0), key=9)
    resumed = driver.add([3, 1, 4, *whole[:5]], 7, key=9, temperature=1.0, slot=6)
    driver.run()
    assert resumed.out == whole[5:]


def test_the_head_sees_sampled_rows_only():
    model = ToyModel()
    driver = Driver(make_runner(model), chunk=4)
    driver.add(PROMPTS[2], 2)
    driver.run()
    assert model.head_rows == [1, 1]  # three chunks that sample nothing, the last chunk, one decode


@pytest.mark.parametrize("chunk", [2, 1000])
def test_prompt_logprobs_are_those_of_a_dense_forward(chunk, monkeypatch):
    monkeypatch.setattr("kernel_core.nn.logprobs.ELEMENTS_AT_ONCE", 3 * V)  # three positions at a time
    driver = Driver(make_runner(), chunk=chunk, depth=2)
    toy = driver.add(PROMPTS[2], 2, flags=PROMPT_LOGPROBS, prompt_logprobs=2)
    plain = driver.add(PROMPTS[0], 2, logprobs=1)
    driver.run()
    dense = ToyModel().dense_logits(toy.prompt)
    assert [position for position, *_ in toy.prompt_logprobs] == list(range(1, len(toy.prompt)))
    for position, ids, values, rank in toy.prompt_logprobs:
        x = dense[position - 1] - np.log(np.exp(dense[position - 1]).sum())
        best = np.argsort(-x)[:2]
        assert ids.tolist() == [toy.prompt[position], *best] and rank == 1 + (x > x[toy.prompt[position]]).sum()
        np.testing.assert_allclose(values, x[ids], atol=1e-4)
    assert not plain.prompt_logprobs and [p for p, *_ in plain.logprobs] == [5, 6] and not toy.logprobs


class Broken(ToyModel):
    """Gives NaN for sequences that contain the token 50."""

    def forward(self, fwd: Forward):
        hidden = super().forward(fwd)
        return hidden.masked_fill((fwd.token_ids == 50)[:, None], float("nan"))


def test_nan_ends_that_request_only():
    driver = Driver(make_runner(Broken()))
    good, bad = driver.add([3, 1, 4], 6), driver.add([9, 50], 6)
    driver.run()
    assert "NaN" in bad.failed and bad.out == []
    assert good.out == oracle(good.prompt, 6, good.sampling) and good.failed is None


def test_masked_positions_are_recomputed_but_not_written():
    runner = make_runner()
    driver = Driver(runner)
    toy = driver.add(PROMPTS[2], 1)
    plan = replace(driver.plan(), write_from=np.array([10], np.int32))
    before = {layer: [t.clone() for t in kv] for layer, kv in runner.kv.kv.items()}
    driver.commit(plan, runner.submit(plan).result())
    for layer, kv in runner.kv.kv.items():
        changed = (kv[0] != before[layer][0]).flatten(1).any(1).nonzero().flatten()
        assert changed.tolist() == [4 + p for p in range(10, 13)]  # blocks 1.. in order, four tokens each
    assert len(toy.out) == 1


def test_planned_copies_move_tokens_of_their_group_before_the_forward():
    runner = make_runner()
    keys = runner.kv.kv["layers.1"][0]
    keys[5] = 3.0
    runner.submit(empty_plan(copies=(Copies(), Copies(np.array([5]), np.array([9]))))).result()
    assert keys[9].eq(3).all() and not runner.kv.kv["layers.0"][0].any()


def test_an_empty_plan_is_run():
    result = make_runner().submit(empty_plan(plan_id=7)).result()
    assert result.plan_id == 7 and len(result.tokens) == 0 and result.offsets.tolist() == [0]


def test_jobs_are_acknowledged_with_their_error():
    seen = []

    def work(data: bytes) -> bytes:
        if data == b"bad":
            raise ValueError("no such adapter")
        seen.append(data)
        return b""

    runner = make_runner(jobs={"lora": work})
    jobs = (Job("lora", "a", b"good"), Job("lora", "b", b"bad"), Job("other", "c", b""))
    acks = runner.submit(empty_plan(jobs=jobs)).result().acks
    assert seen == [b"good"] and [a.key for a in acks] == ["a", "b", "c"]
    assert acks[0].error is None and "no such adapter" in acks[1].error and "takes no jobs" in acks[2].error


def test_a_device_replaces_parts_by_name():
    calls = []

    def graphs(model):
        return lambda fwd: calls.append(len(fwd.token_ids)) or model(fwd)

    driver = Driver(make_runner(parts={"graphs": graphs}))
    toy = driver.add([1, 2, 3], 2)
    driver.run()
    assert calls == [3, 1] and len(toy.out) == 2
    with pytest.raises(PluginError, match="attention_planner"):
        make_runner(parts={"attention_planner": graphs})


class Scale:
    """A step input that the model does not know, and an owner of positions."""

    def __init__(self, *names):
        self.names = {name: (torch.int64, "tokens", 0) for name in names}
        self.shift = 0

    def opened(self, opened): ...
    def closed(self, slot): ...
    def fill(self, step):
        return {name: step.positions + self.shift for name in self.names}


def test_a_step_input_has_one_owner_and_positions_are_one():
    owner = Scale("positions")
    owner.shift = 1
    driver = Driver(make_runner(step_inputs=[owner]))
    driver.add([1, 2, 3], 4)
    (shifted,) = driver.run()
    assert shifted != oracle([1, 2, 3], 4, SamplingRow(0.0))
    with pytest.raises(ConfigError, match="scale"):
        make_runner(step_inputs=[Scale("scale"), Scale("scale")])


def test_steps_say_where_their_time_went():
    driver = Driver(make_runner())
    driver.add([1, 2], 1)
    timings = driver.runner.submit(driver.plan()).result().timings
    assert set(timings) == {"inputs", "forward", "sample", "propose", "total"}
    assert timings["total"] >= timings["forward"] > 0


class NoAttention(ToyModel):
    """The toy without attention: the reference backend reads lengths on the host, which is its right."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList()


class Forbidden(TorchDispatchMode):
    """Raises at operations for which the host waits for the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        assert not any(word in str(op) for word in self.WAITING), op
        if str(op).startswith(("aten.index.", "aten.index_put", "aten._index_put")):
            indices = [i for i in args[1] if i is not None]
            assert all(i.dtype is torch.int64 for i in indices), f"{op} with a mask waits for the count"
        return op(*args, **(kwargs or {}))


class FixedDrafter:
    """Always drafts the tokens 1, 2, 3: after each other, or side by side."""

    width, taps, lookback, needs_host, length = 3, (), 1, False, None

    def __init__(self, tree: bool):
        self.tree = tree

    def opened(self, opened): ...
    def closed(self, slot): ...
    def propose(self, view):
        rows = len(view.step.rows)
        parents = torch.full((3,), -1) if self.tree else torch.arange(-1, 2)
        return torch.arange(1, 4).repeat(rows, 1), parents.int().repeat(rows, 1), torch.full((rows,), 3)


@pytest.mark.parametrize("tree", [False, True])
def test_submitting_a_step_reads_nothing_from_the_device(tree, monkeypatch):
    """So that on a device that runs by itself, steps can be submitted ahead of their results."""
    drafter = FixedDrafter(tree)
    transforms = [Penalties("penalties", 8, CPU, Penalise()), BiasRule("rules"), MaskRule("rules", V, CPU, ban)]
    payloads = {"penalties": encode(PENALTY), "rules": encode(RULES)}
    runner = make_runner(NoAttention(), width=3, drafter=drafter, transforms=transforms)
    runner.sampler._reads_are_free = False
    driver = Driver(runner, width=3, chunk=3)
    for i, (prompt, sampling) in enumerate(zip(PROMPTS, SAMPLINGS)):
        driver.add(
            prompt, 8, payloads=payloads if i else {}, logprobs=i - 1, prompt_logprobs=1, flags=PROMPT_LOGPROBS, **sampling
        )

    def waits(*_, **__):
        raise AssertionError("the host waited for the device")

    submit = runner.submit

    def watched(plan):
        with monkeypatch.context() as patch, Forbidden():
            for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"):
                patch.setattr(torch.Tensor, name, waits)
            pending = submit(plan)
            pending.download, tensors = None, pending.download
        pending.download = tensors
        return pending

    monkeypatch.setattr(runner, "submit", watched)
    assert all(len(out) == 8 for out in driver.run())
