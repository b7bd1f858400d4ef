"""The whole device without a GPU: tokens are those of the CPU device, nothing of the host gets to a kernel, no step waits."""

from functools import partial

import pytest
import torch
from model_references import CASES

from kernel_core import Engine

pytest.importorskip("triton")
import emulated_device
import pretended_gpu
from kernel_cuda.attention import CudaAttention
from matrix_features import FEATURES, differences
from pretended_gpu import GPU, GpuTensor
from test_cuda_split import MANY, bottom_right
from torch.utils._python_dispatch import _disable_current_modes

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or pretended_gpu.COMPILER is None, reason="test_cuda_device.py runs on the GPU, or no C++ compiler"
)
ALL = {"model_graphs": True, "fused_steps": True}
SETTINGS = {"as it is": {}, "no graphs": {"graphs": False}, "all": ALL}
LENGTHS = (3, 17, 40, 9, 1, 5)
ASKED = [
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}},
    {"temperature": 0.9, "seed": 3, "top_p": 0.9, "top_k": 40},
    {"temperature": 0.0, "min_tokens": 4, "prompt_logprobs": 1},
    {"temperature": 1.1, "seed": 5, "allowed_token_ids": [4, 5, 6, 7, 8]},
    {"temperature": 0.0, "max_tokens": 14},
]


@pytest.fixture
def quick(monkeypatch):
    """Attention by whole-tensor ops, and graphs of small sizes."""
    monkeypatch.setattr("kernel_cuda.attention.CudaAttention", emulated_device.TensorAttention)
    monkeypatch.setattr("kernel_cuda.forward.MIXED", (32,))
    for module in ("forward", "steady"):
        monkeypatch.setattr(f"kernel_cuda.{module}.LENGTHS", (32, 128))


def answers(model, device, asked=ASKED, **options):
    options = {"max_model_len": 64, "max_requests": 4, "max_tokens_per_step": 32, "dtype": "float32"} | options
    with Engine(model=str(model), device=device, **options) as engine:
        draw = torch.Generator().manual_seed(0)
        for number, (length, params) in enumerate(zip(LENGTHS, asked)):
            prompt = torch.randint(2, 150, (length,), generator=draw).tolist()
            params = {"max_tokens": 8 + number, "ignore_eos": True, "detokenize": False} | params
            engine.add_request(str(number), prompt, engine.intake.params(**params))
        outputs = {}
        while engine.has_unfinished_requests():
            outputs.update((output.request_id, output) for output in engine.step())
        engine.core.scheduler.check()
    return outputs


def agree(model, **options):
    """The CPU device's answers on a pretended GPU, and not one wait."""
    expected = answers(model, "cpu", **{key: value for key, value in options.items() if key != "plugins"})
    with pretended_gpu.use() as gpu:
        got = answers(model, "cuda", **options)
    assert differences(expected, got, False) == [] and gpu.waits == [] and gpu.steps > 5
    return gpu


def test_a_few_requests(byte_model, quick):
    gpu = agree(byte_model, asked=[ASKED[0], ASKED[2] | ASKED[1], ASKED[5]], plugins={"cuda": ALL}, kv_blocks=30)
    assert gpu.graphs[0].graphs > 1 and gpu.graphs[0].replays > 4


@pytest.mark.slow
@pytest.mark.parametrize("cuda", SETTINGS.values(), ids=SETTINGS)
def test_whatever_requests_ask_for(byte_model, quick, cuda):
    gpu = agree(byte_model, plugins={"cuda": cuda}, kv_blocks=30)
    assert [graphs.graphs > 0 for graphs in gpu.graphs] == [True] * cuda.get("graphs", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "cuda"), [({"max_tokens_per_step": 7}, ALL), ({"kv_blocks": 9}, {})], ids=["chunked, all", "preempted, as it is"]
)
@pytest.mark.parametrize("name", CASES)
def test_every_family(checkpoint, quick, name, options, cuda):
    agree(checkpoint(name), **{"kv_blocks": 30, "plugins": {"cuda": cuda}} | options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
def test_with_the_kernels_of_attention(checkpoint, name):
    agree(checkpoint(name), asked=ASKED[:3], kv_blocks=30, max_model_len=48)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "cuda"),
    [
        *(pytest.param(name, ALL, id=f"{name}, all") for name in FEATURES if name != "worker_process"),
        *(pytest.param(name, {}, id=f"{name}, as it is") for name in ("kv_offload", "ngram", "eagle3", "guided_decoding")),
    ],
)
def test_features(quick, feature_on_cuda, name, cuda):
    run = feature_on_cuda(name, cuda, kv_blocks=200)
    with pretended_gpu.use() as gpu:
        assert run() == [] and gpu.waits == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_mixed_steps_through_flash(checkpoint, monkeypatch, name):
    """Flash is a formula, which gets what is on the GPU; our kernels do the other rows."""
    calls = []

    def attend(q, k, v, q_start, k_start, *numbers):
        calls.append(len(q_start))
        assert all(type(x) is GpuTensor for x in (q, k, v, q_start, k_start))
        with _disable_current_modes():
            return GpuTensor(bottom_right(*(x.host for x in (q, k, v, q_start, k_start)), *numbers))

    monkeypatch.setattr("kernel_cuda.attention.CudaAttention", partial(CudaAttention, attend=attend, rule=MANY))
    options = dict(max_tokens_per_step=24, kv_blocks=30, plugins={"cuda": {"mixed_flash": True}})
    agree(checkpoint(name), asked=[ASKED[5], ASKED[0], ASKED[0]], **options)
    assert len(calls) > 3 and max(calls) > 3


@pytest.mark.slow
def test_the_measured_start(checkpoint, quick, caplog):
    """The largest step runs before KV is allocated, with all that it asks for."""
    caplog.set_level("INFO", "kernel_cuda")
    agree(checkpoint("llama"))
    assert "measured: a step of 32 tokens" in caplog.text


class TestThePretendedGpu:
    @pytest.fixture
    def gpu(self):
        with pretended_gpu.use() as gpu:
            gpu.in_step = True
            yield gpu

    def test_tensors_are_where_they_are_put(self, gpu):
        x = torch.arange(6, device="cuda").view(2, 3)
        assert x.is_cuda and type(x) is GpuTensor and x[1].device == GPU and (x[1] + 1).cpu().tolist() == [4, 5, 6]
        assert type(torch.zeros(2)) is torch.Tensor and torch.nn.Linear(2, 2, device="meta").weight.is_meta
        x[0].add_(1)
        assert x.to("cpu").tolist() == [[1, 2, 3], [3, 4, 5]]

    def test_what_the_host_waits_for_is_told(self, gpu):
        x, index = torch.arange(6, device="cuda"), torch.arange(2, device="cuda")
        pinned = torch.empty(6, dtype=torch.int64, pin_memory=True)
        does_not_wait = (
            lambda: pinned.copy_(x, non_blocking=True), lambda: torch.ones(3).pin_memory().to(GPU, non_blocking=True),
            x[index].sum, lambda: x.index_fill_(0, index, 3), lambda: torch.where(x > 2, x, 0), lambda: x.fill_(2),
            lambda: x[3:5].copy_(x[:2]),
        )  # fmt: skip
        waits = (
            x.cpu, x[0].item, lambda: bool(x[0] > 1), lambda: x[x > 1], x.nonzero,
            lambda: torch.ones(3).to(GPU), lambda: torch.empty(6, dtype=torch.int64).copy_(x), lambda: x[torch.arange(2)],
            lambda: x.__setitem__(index, 0), lambda: x.repeat_interleave(x), lambda: torch.ones(3).pin_memory().to(GPU),
            lambda: pinned.copy_(x), lambda: x.copy_(pinned),
        )  # fmt: skip
        gpu.waits.clear()
        for number, call in enumerate(does_not_wait):
            call()
            assert gpu.waits == [], number
        for number, call in enumerate(waits):
            gpu.waits.clear()
            call()
            assert gpu.waits, number

    def test_tensors_of_both_places_are_refused(self, gpu):
        from kernel_cuda.kernels.pointwise import embedding

        ids, weight = torch.zeros(2, dtype=torch.int64), torch.zeros(4, 8, device="cuda")
        with pytest.raises(RuntimeError, match=r"aten::add\.?.*of the host and of the GPU"):
            weight + torch.ones(8)
        with pytest.raises(ValueError, match="_gather cannot read a tensor of the host"):
            embedding(ids, weight)
        assert embedding(ids.to(GPU), weight).shape == (2, 8) and (weight + torch.tensor(1.0)).is_cuda
