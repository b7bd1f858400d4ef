"""Recorded decode steps: the same results as the model's own, and never a stale one."""

import random
from dataclasses import replace

import pytest
import torch
from kernel_cpu import build, linear, pointwise
from kernel_cpu.replay import MOST_TOKENS, SIGHTINGS, Replay
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


def lengths(replay: Replay) -> list[int]:
    return [len(made.results(Forward(None, None))) for made in replay.recorded.values()]


def warmed(model: Toy) -> Replay:
    replay = Replay(model)
    for _ in range(SIGHTINGS + 1):
        fwd = step()
        assert torch.equal(replay(fwd), model(fwd))
    return replay


def test_a_recorded_step_calls_no_module_and_gives_the_same():
    model = Toy()
    replay = warmed(model)
    assert lengths(replay) == [ROWS]
    fwd = step()
    expected = model(fwd).clone()
    model.forward = None
    assert torch.equal(replay(fwd), expected)


@pytest.mark.parametrize(
    "extra", [lambda x: x / 3, lambda x: x.mul_(2), lambda x: x[: x[0, 0].int().item() * 0 + ROWS], torch.clone]
)
def test_a_model_that_computes_with_torch_is_run_as_it_is(extra):
    assert not warmed(Toy(extra)).recorded


@pytest.mark.parametrize("extra", [lambda x: x + 1, lambda x: x * 0.5, lambda x: torch.cat([x[1:], x[:1]])])
def test_sums_products_and_concatenations_are_repeated(extra):
    model = Toy(extra)
    replay = warmed(model)
    assert lengths(replay) == [ROWS]
    model.forward = None
    replay(step())


def test_what_a_replay_gave_stays():
    model = Toy()
    replay = warmed(model)
    fwd = step()
    kept = replay(fwd)
    replay(step())
    assert torch.equal(kept, model(fwd))


def test_rows_of_several_tokens_are_recorded_by_their_shape():
    model = Toy()
    replay = warmed(model)
    for _ in range(SIGHTINGS + 1):
        fwd = step()
        batch = fwd.attention["layer"]
        fwd.attention["layer"] = replace(batch, q_start=torch.tensor([0, 2, 3]).int(), kv_len=batch.kv_len[:2])
        assert torch.equal(replay(fwd), model(fwd))
    assert lengths(replay) == [ROWS, ROWS]


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
    model.forward = None
    replay(fwd)
    model.forward = Toy.forward.__get__(model)
    large, mixed = step(MOST_TOKENS + 1), step()
    mixed.token_ids = torch.arange(ROWS + 1)
    for fwd in (large, mixed) * (SIGHTINGS + 2):
        replay(fwd)
    assert lengths(replay) == [ROWS]


def test_a_token_id_outside_is_refused_as_by_the_model():
    replay = warmed(Toy())
    fwd = step()
    fwd.token_ids[1] = VOCABULARY
    with pytest.raises(IndexError):
        replay(fwd)


DRAFTERS = {
    "eagle3": {"eagle": {"head": "tiny-chat-eagle3", "adaptive": False}},
    "tree": {"eagle": {"head": "tiny-chat-eagle3", "tree": True, "draft_tokens": 8, "adaptive": False}},
    "draft_model": {"draft_model": {"model": "tiny-draft", "adaptive": False}},
}


def tokens(replays: bool, dtype: str, plugins=None, counts=(1, 2, 8, 5, 9), **options):
    draw, recorded = random.Random(0), []
    with LLM("tiny-chat", device="cpu", dtype=dtype, plugins={"cpu": {"replay": replays}, **(plugins or {})}, **options) as llm:
        found = []
        for count in counts:
            prompts = [[draw.randrange(2, 500) for _ in range(draw.randrange(1, 60))] for _ in range(count)]
            outputs = llm.generate(prompts, temperature=0.7, seed=1, max_tokens=30, ignore_eos=True, progress=False)
            found.append([output.outputs[0].token_ids for output in outputs])
        runner = llm.engine.core.executor._worker.runner
        for graphs in (runner.graphs, getattr(runner.drafter, "_pass", None)):
            recorded.append(getattr(graphs, "recorded", {}))
        return found, recorded


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_drafts_are_the_same_with_and_without(drafter):
    (plain, _), (replayed, (steps, passes)) = (tokens(on, "float32", DRAFTERS[drafter], (1, 2)) for on in (False, True))
    assert replayed == plain and passes
    kinds = {kind for kind, *_ in steps}
    assert any(trees is (drafter == "tree") and tapped is (drafter != "draft_model") for tapped, trees, _ in kinds)
    assert any(not single for _, _, single in kinds), "no step with drafts was recorded"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("options", [{}, {"kv_blocks": 40, "max_model_len": 120}], ids=["roomy", "preempting"])
def test_tokens_are_the_same_with_and_without(dtype, options):
    (plain, _), (replayed, (recorded, _)) = tokens(False, dtype, **options), tokens(True, dtype, **options)
    assert replayed == plain and len(recorded) >= 4
