"""Steps that are not steady, with the model as an emulated graph: the answers are those of the plain CPU device."""

from functools import partial

import pytest
import torch

from kernel_core import Engine

pytest.importorskip("triton")
import emulated_device
from kernel_cuda.forward import RATE
from matrix_features import FEATURES, differences
from matrix_features import run as run_features

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_device.py runs real graphs")
greedy = partial(dict, temperature=0, max_tokens=10, ignore_eos=True, detokenize=False)
random = partial(greedy, temperature=1.0, seed=3)
PROMPTS = [[7, 8, 9] * 5, [1, 2, 3], list(range(30))]

#: (parameters by request, configuration)
KINDS = {
    "penalties": ([greedy(repetition_penalty=1.5), random(frequency_penalty=1.0), greedy()], {}),
    "bias and minimum": ([greedy(logit_bias={5: 4.0}), greedy(min_tokens=6), random(allowed_token_ids=[4, 5, 6, 7])], {}),
    "logprobs": ([greedy(logprobs=3), random(logprobs=0), greedy()], {}),
    "chain of drafts": ([greedy(max_tokens=20), random(), greedy(repetition_penalty=1.1)], {"plugins": {"ngram": {}}}),
    "drafts and preemption": ([greedy(max_tokens=20), greedy(logprobs=2), greedy()], {"plugins": {"ngram": {}}, "kv_blocks": 9}),
}

QUICK = ("penalties", "chain of drafts")


def run(model, asked, **options):
    with Engine(model=str(model), device="cpu", dtype="float32", max_model_len=96, max_requests=4, **options) as engine:
        outputs, waiting = {}, list(enumerate(zip(PROMPTS, asked, strict=True)))
        while waiting or engine.has_unfinished_requests():
            if waiting:
                name, (prompt, params) = waiting.pop(0)
                engine.add_request(str(name), prompt, engine.intake.params(**params))
            outputs.update((output.request_id, output.outputs[0]) for output in engine.step())
        engine.core.scheduler.check()
    return outputs


def alike(expected, got):
    assert {name: out.token_ids for name, out in got.items()} == {name: out.token_ids for name, out in expected.items()}
    for name, out in expected.items():
        for one, other in zip(out.logprobs or (), got[name].logprobs or (), strict=True):
            assert list(one) == list(other)
            assert all(abs(one[token].logprob - other[token].logprob) < 1e-3 for token in one)


@pytest.mark.parametrize(
    ("asked", "options"), [pytest.param(*KINDS[name], id=name, marks=() if name in QUICK else pytest.mark.slow) for name in KINDS]
)
def test_steps_that_are_not_steady(byte_model, monkeypatch, asked, options):
    expected = run(byte_model, asked, **options)
    parts = emulated_device.use(monkeypatch)
    alike(expected, run(byte_model, asked, **options))
    assert parts[0].ran > 5 and not parts[0].others


def test_prompts_that_take_longer_to_compute_than_to_launch_run_as_they_are(byte_model, monkeypatch):
    parts = emulated_device.use(monkeypatch)
    expected = run(byte_model, [greedy()] * 3)
    assert parts[0].others == []
    model = parts[0].module
    operations = 2 * sum(parameter.numel() for parameter in model.parameters()) / len(model.layers)  # of a token in a layer
    for tokens, others in ((32, []), (31, [32])):  # the last prompt has 30, beside two rows that decode
        monkeypatch.setattr("kernel_cuda.forward.LAUNCHED", 1.001 * tokens * operations / (132 * RATE))
        alike(expected, run(byte_model, [greedy()] * 3))
        assert parts[-1].others == others and parts[-1].ran > 5


@pytest.mark.slow
def test_drafts_through_the_interpreted_kernels(byte_model, monkeypatch):
    asked, options = KINDS["chain of drafts"]
    expected = run(byte_model, asked, **options)
    parts = emulated_device.use(monkeypatch, backend=emulated_device.CudaAttention)
    alike(expected, run(byte_model, asked, **options))
    assert parts[0].ran > 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ngram", "mlp_speculator tree", "eagle3", "eagle3 tree", "draft_model", "guided_decoding"])
def test_features_of_the_matrix(monkeypatch, name):
    monkeypatch.setattr("matrix_features.LENGTHS", (16, 12, 24, 14, 16, 14, 8))
    feature = FEATURES[name]
    expected = run_features([feature], "cpu")
    parts = emulated_device.use(monkeypatch)
    assert differences(expected, run_features([feature], "cpu"), False) == []
    assert all(part.ran > 1 for part in parts)


def test_a_shape_is_captured_when_it_comes_again_and_what_cannot_be_is_not(byte_model, monkeypatch, caplog):
    parts = emulated_device.use(monkeypatch, sightings=2)
    alike(expected := run(byte_model, [greedy()] * 3), run(byte_model, [greedy()] * 3))
    assert 1 in parts[0].others and parts[0].ran > 3
    model = parts[-1].module
    monkeypatch.setattr(type(model), "forward", _reading(type(model).forward))
    alike(expected, run(byte_model, [greedy()] * 3))
    assert parts[-1].ran == 0 and "capturing it failed" in caplog.text


def _reading(forward):
    def read(self, fwd):
        assert fwd.token_ids.sum().item() >= 0
        return forward(self, fwd)

    return read
