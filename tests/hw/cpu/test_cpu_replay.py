"""Recorded decode steps: the same results as the model's own, and never a stale one."""

import random

import pytest
import torch
from kernel_cpu import build, linear, pointwise
from kernel_cpu.replay import MOST_ROWS, SIGHTINGS, Replay
from torch import nn

from kernel_core import LLM
from kernel_core.nn.api import AttentionBatch, Forward

ROWS, SIZE, VOCABULARY = 3, 40, 50

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no compiler")


class Toy(nn.Module):
    """An embedding and a product; `extra` does something between."""

    def __init__(self, extra=lambda x: x):
        super().__init__()
        self.table = nn.Parameter(torch.randn(VOCABULARY, SIZE).bfloat16(), requires_grad=False)
        self._state = self.packed()
        self.extra = extra

    def packed(self):
        return linear.pack(torch.randn(SIZE, SIZE).bfloat16()), None

    def forward(self, fwd: Forward):
        x = self.extra(pointwise.embedding(fwd.token_ids, self.table))
        return linear.linear(x.view(-1, SIZE), *self._state)


def step(rows: int = ROWS, columns: int = 2) -> Forward:
    ids = torch.randint(0, VOCABULARY, (rows,))
    lengths = torch.full((rows,), 7, dtype=torch.int32)
    table = torch.zeros(rows, columns, dtype=torch.int32)
    batch = AttentionBatch(torch.arange(rows + 1).int(), lengths, table, torch.zeros(rows).long(), 16, 1, 7)
    return Forward(ids, lengths.long(), attention={"layer": batch}, tapped=False)


def warmed(model: Toy) -> Replay:
    replay = Replay(model)
    for _ in range(SIGHTINGS + 1):
        fwd = step()
        assert torch.equal(replay(fwd), model(fwd))
    return replay


def test_a_recorded_step_calls_no_module_and_gives_the_same():
    model = Toy()
    replay = warmed(model)
    assert list(replay.recorded) == [ROWS]
    fwd = step()
    expected = model(fwd).clone()
    model.forward = None
    assert torch.equal(replay(fwd), expected)


@pytest.mark.parametrize(
    "extra", [lambda x: x + 1, lambda x: x.mul_(2), lambda x: x[: x[0, 0].int().item() * 0 + ROWS], torch.clone]
)
def test_a_model_that_computes_with_torch_is_run_as_it_is(extra):
    assert not warmed(Toy(extra)).recorded


def test_views_are_replayed():
    assert warmed(Toy(lambda x: x.unflatten(1, (2, -1)).flatten(1).split([SIZE], -1)[0])).recorded


def test_weights_that_were_replaced_are_used_at_once():
    model = Toy()
    replay = warmed(model)
    fwd = step()
    before = replay(fwd).clone()
    model._state = model.packed()
    assert torch.equal(replay(fwd), model(fwd)) and not torch.equal(model(fwd), before)
    model.table = nn.Parameter(torch.randn(VOCABULARY, SIZE).bfloat16(), requires_grad=False)
    assert torch.equal(replay(fwd), model(fwd))


def test_hooks_of_modules_are_called():
    model = Toy()
    replay = warmed(model)
    called = []
    with model.register_forward_hook(lambda *arguments: called.append(arguments)):
        replay(step())
    replay(step())
    assert len(called) == 1


def test_longer_tables_are_recorded_again_and_large_or_mixed_steps_never():
    model = Toy()
    replay = warmed(model)
    fwd = step(columns=200)
    assert torch.equal(replay(fwd), model(fwd))
    assert replay.recorded[ROWS].fits([fwd.attention["layer"]])
    large, mixed = step(MOST_ROWS + 1), step()
    mixed.token_ids = torch.arange(ROWS + 1)
    for fwd in (large, mixed) * (SIGHTINGS + 2):
        replay(fwd)
    assert list(replay.recorded) == [ROWS]


def test_a_token_id_outside_is_refused_as_by_the_model():
    replay = warmed(Toy())
    fwd = step()
    fwd.token_ids[1] = VOCABULARY
    with pytest.raises(IndexError):
        replay(fwd)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"kv_blocks": 40, "max_model_len": 120}], ids=["roomy", "preempting"])
def test_tokens_are_the_same_with_and_without(dtype, options):
    def tokens(replays: bool):
        draw = random.Random(0)
        with LLM("tiny-chat", device="cpu", dtype=dtype, plugins={"cpu": {"replay": replays}}, **options) as llm:
            found = []
            for count in (1, 2, 8, 5, 9):
                prompts = [[draw.randrange(2, 500) for _ in range(draw.randrange(1, 60))] for _ in range(count)]
                outputs = llm.generate(prompts, temperature=0.7, seed=1, max_tokens=30, ignore_eos=True, progress=False)
                found.append([output.outputs[0].token_ids for output in outputs])
            graphs = llm.engine.core.executor._worker.runner.graphs
            return found, len(getattr(graphs, "recorded", ()))

    (plain, _), (replayed, recorded) = tokens(False), tokens(True)
    assert replayed == plain and recorded >= 4
