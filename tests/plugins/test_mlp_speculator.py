"""What the MLP speculator proposes against its published formula, on random weights under the published tensor names."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dense_harness import NoHooks, context
from kernel_mlp_speculator import MLPSpeculatorSection
from kernel_mlp_speculator.drafter import SpeculatorDrafter
from kernel_mlp_speculator.tree import most_probable
from kernel_safetensors.checkpoint import Safetensors
from safetensors.torch import save_file

from kernel_core.errors import ConfigError
from kernel_core.nn.api import DraftView, LayeredDrafter, Target
from kernel_core.nn.loading import build_model

VOCAB, HIDDEN, STAGES, ROWS = 23, 12, 3, 4
CONFIG = dict(vocab_size=VOCAB, emb_dim=HIDDEN, inner_dim=0, n_predict=STAGES, top_k_tokens_per_head=[5, 4, 3], n_candidates=5)


def tensors_of(config, repeated=True) -> dict[str, torch.Tensor]:
    """Random tensors with the published names; of tied layers the same tensor once or for every stage."""
    draw = torch.Generator().manual_seed(3)
    inner, tied = config["inner_dim"] or HIDDEN, config["tie_weights"]
    out = {}
    for i in range(STAGES):
        shapes = {f"emb.{i}.weight": (VOCAB, inner), f"head.{i}.weight": (VOCAB, inner)}
        shapes |= {f"ln.{i}.weight": (inner,), f"ln.{i}.bias": (inner,), f"proj.{i}.weight": (inner, inner if i else HIDDEN)}
        for name, shape in shapes.items():
            first = 1 if name.startswith("proj") else 0
            if tied and i > first:
                if repeated:
                    out[f"speculator.{name}"] = out[f"speculator.{name.replace(str(i), str(first))}"].clone()
            else:
                out[f"speculator.{name}"] = torch.randn(shape, generator=draw) * 0.5
    return out


def stage(weights, config, i, h, token):
    """Stage i of the formula, in plain torch: state [D], token → state, logits."""
    inner = config["inner_dim"] or HIDDEN
    a = 0.5 ** (0.5 / STAGES)
    b = ((1 - a**2) * inner / 2) ** 0.5
    w = {name: weights[f"speculator.{name}.{i}.weight"] for name in ("emb", "proj", "ln", "head")}
    s = w["proj"] @ h + (b / a) * w["emb"][token]
    s = s * torch.rsqrt((s * s).mean() + 1e-6) * w["ln"] + weights[f"speculator.ln.{i}.bias"]
    s = s * 0.5 * (1 + torch.erf(s / 2**0.5))
    return s, w["head"] @ s


def first(config, h):
    return h * torch.rsqrt((h * h).mean() + 1e-6) / 2**0.5 if config["scale_input"] else h


def chain(weights, config, h, token, draw=torch.argmax):
    h, out = first(config, h), []
    for i in range(STAGES):
        h, logits = stage(weights, config, i, h, token)
        token = int(draw(logits))
        out.append(token)
    return out


def tree(weights, config, h, token, number):
    """The best candidates as {path: log probability}: every stage continues the best n_candidates of the one before."""
    beams, paths = [(0.0, (), first(config, h), token)], {}
    for i, k in enumerate(config["top_k_tokens_per_head"]):
        made = []
        for score, path, state, last in beams:
            after, logits = stage(weights, config, i, state, last)
            values, ids = logits.log_softmax(-1).topk(k)
            made += [(score + v, (*path, t), after, t) for v, t in zip(values.tolist(), ids.tolist())]
        paths |= {path: score for score, path, *_ in made}
        beams = sorted(made, key=lambda one: -one[0])[: config["n_candidates"]]
    return dict(sorted(paths.items(), key=lambda item: -item[1])[:number])


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mlp_speculator"}))
    save_file(tensors, folder / "model.safetensors")
    return str(folder)


def built(folder, target_config=None, **section) -> SpeculatorDrafter:
    """The drafter on a target of which only sizes matter."""
    drafter = SpeculatorDrafter(MLPSpeculatorSection(head=folder, adaptive=False, **section), 8)
    ctx = context(folder)
    info = replace(ctx.info, config=target_config or {"hidden_size": HIDDEN, "vocab_size": VOCAB})

    def load(found, family):
        return build_model(family, replace(ctx, info=found), NoHooks())

    drafter.build(Target(info, ctx, None, None, Safetensors().inspect, load))
    return drafter


def view_of(seed=0, sampled=(True,) * ROWS, passes=None) -> DraftView:
    """Rows whose newest token came after the last of one to three path places, each somewhere in the step."""
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(3 * ROWS, HIDDEN, generator=draw)
    path = torch.stack([torch.tensor([3 * r, 3 * r + r % 3, 3 * r + r % 3]) for r in range(ROWS)])
    last = torch.randint(0, VOCAB, (ROWS,), generator=draw)
    slots, none = np.arange(ROWS), torch.zeros(0)
    return DraftView(
        None, none, last, hidden, {}, torch.ones(ROWS), last, path, slots, np.array(sampled), 99 * np.array(sampled), passes
    )


def inputs(view, row):
    return view.hidden[3 * row + row % 3], int(view.last_token[row])


VARIANTS = [dict(tie_weights=tie, scale_input=scale, inner_dim=inner) for tie in (0, 1) for scale in (0, 1) for inner in (0, 8)]


@pytest.fixture(params=VARIANTS, ids=lambda v: "-".join(f"{k}={n}" for k, n in v.items()))
def published(request, tmp_path):
    config = CONFIG | request.param
    tensors = tensors_of(config)
    return write(tmp_path / "head", config, tensors), config, tensors


def test_chains_follow_the_formula(published):
    folder, config, weights = published
    drafter, view = built(folder), view_of(sampled=(True, True, False, True))
    assert isinstance(drafter, LayeredDrafter) and (drafter.width, drafter.ahead, drafter.tree) == (STAGES, 0, False)
    tokens, parents, count = drafter.propose(view)
    for row in range(ROWS):
        assert tokens[row].tolist() == ([-1] * 3 if row == 2 else chain(weights, config, *inputs(view, row)))
    assert parents.tolist() == [[-1, 0, 1]] * ROWS and count.tolist() == [3, 3, 0, 3]


@pytest.mark.parametrize("number", [1, 6, 40])
def test_trees_are_the_most_probable_candidates(published, number):
    folder, config, weights = published
    drafter, view = built(folder, tree=True, draft_tokens=min(number, 32)), view_of(1)
    tokens, parents, count = drafter.propose(view)
    assert count.tolist() == [drafter.width] * ROWS
    for row in range(ROWS):
        paths = []
        for token, parent in zip(tokens[row].tolist(), parents[row].tolist()):
            assert parent < len(paths)
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        assert set(paths) == set(tree(weights, config, *inputs(view, row), drafter.width))


def test_equal_scores_keep_parents_before_their_children():
    tokens, parents = torch.tensor([[4, 5, 6, 7]]), torch.tensor([[-1, -1, 0, 2]])
    got = most_probable(tokens, parents, torch.tensor([[-1.0, -2.0, -1.0, -1.0]]), 3)
    assert [t.tolist() for t in got] == [[[4, 6, 7]], [[-1, 0, 1]]]


@pytest.mark.parametrize("sampled", [(True,) * ROWS, (False, True, True, False)])
def test_chains_take_the_requests_own_draws(tmp_path, sampled):
    config = CONFIG | dict(tie_weights=False, scale_input=True)
    weights = tensors_of(config)
    asked = []

    def draw(logits, number):
        assert logits.shape == (ROWS, VOCAB)
        asked.append(number)
        return logits.argmin(-1)

    view = view_of(2, sampled, SimpleNamespace(draw=draw))
    tokens, *_ = built(write(tmp_path / "head", config, weights)).propose(view)
    wanted = [chain(weights, config, *inputs(view, row), torch.argmin) if on else [-1] * 3 for row, on in enumerate(sampled)]
    assert tokens.tolist() == wanted and asked == [0, 1, 2]


def test_tied_weights_may_be_stored_once(tmp_path):
    config = CONFIG | dict(tie_weights=True, scale_input=False)
    once, again = (built(write(tmp_path / str(r), config, tensors_of(config, r))).propose(view_of()) for r in (False, True))
    assert torch.equal(once[0], again[0])


def test_adaptive_lengths_cut_chains_and_skip_rows(tmp_path):
    config = CONFIG | dict(tie_weights=False, scale_input=False)
    drafter = built(write(tmp_path / "head", config, tensors_of(config)))
    full = drafter.propose(view_of())[0]
    drafter.length = SimpleNamespace(lengths=lambda slots, most: np.array([2, 0, 1, 3], np.int32))
    tokens, _, count = drafter.propose(view_of())
    assert count.tolist() == [2, 0, 1, 3]
    assert all(tokens[row].tolist() == [*full[row, :n].tolist(), *[-1] * (3 - n)] for row, n in enumerate([2, 0, 1, 3]))


@pytest.mark.parametrize(
    "section, changes, target, message",
    [
        ({"draft_tokens": 4}, {}, {}, r"draft_tokens = 4 is more than the 3 tokens it predicts"),
        ({"draft_tokens": 21, "tree": True}, {"top_k_tokens_per_head": [2, 2, 2], "n_candidates": 2}, {}, r"than the 10 cand"),
        ({}, {"top_k_tokens_per_head": [5, 4]}, {}, r"top_k_tokens_per_head for 2 of 3 stages"),
        ({}, {}, {"hidden_size": 64}, r"hidden_size 12; this one has 64"),
        ({}, {}, {"vocab_size": 99}, r"vocab_size 23; this one has 99"),
        ({}, {"n_predict": 1, "top_k_tokens_per_head": [5], "tie_weights": True}, {}, r"ties the weights of a single stage"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, section, changes, target, message):
    config = CONFIG | dict(tie_weights=False, scale_input=False) | changes
    tensors = tensors_of(CONFIG | dict(tie_weights=False, scale_input=False))
    with pytest.raises(ConfigError, match=message):
        built(write(tmp_path / "head", config, tensors), {"hidden_size": HIDDEN, "vocab_size": VOCAB} | target, **section)


def test_another_kind_of_checkpoint_is_refused(tmp_path):
    folder = write(tmp_path / "head", CONFIG, {"x": torch.zeros(1)})
    (tmp_path / "head" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="of the type 'llama'"):
        built(folder)
