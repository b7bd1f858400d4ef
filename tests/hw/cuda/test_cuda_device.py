"""The device on a GPU: the same answers as the CPU device, and no step that makes the host wait."""

from collections import Counter
from functools import partial

import pytest
import torch
from steady_workload import REQUESTS
from step_twins import ENGINES, OTHERS, check, twins

from kernel_core import Engine, SamplingParams

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
greedy = partial(SamplingParams, temperature=0, ignore_eos=True, detokenize=False)
LENGTHS = (3, 17, 40, 64, 9, 1)
FEATURES_ALONE = (
    *("prefix_caching", "kv_offload", "ngram", "mlp_speculator", "draft_model"),
    *("eagle", "eagle3", "eagle3 tree", "n > 1", "logprobs"),
)
MODELS = ("llama", "qwen3", "mixtral", "gemma3", "gemma2", "mistral-window", "qwen3-moe")


def prompts(vocab_size, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (length,), generator=draw).tolist() for length in LENGTHS]


def run(model, device, params=None, **options):
    """Outputs by request, all added at once."""
    with Engine(model=str(model), device=device, max_model_len=128, max_requests=8, **options) as engine:
        for number, prompt in enumerate(prompts(150)):
            engine.add_request(str(number), prompt, params or greedy(max_tokens=12 + number))
        outputs = {}
        while engine.has_unfinished_requests():
            outputs.update((output.request_id, output) for output in engine.step())
        engine.core.scheduler.check()
    return outputs


def tokens(outputs):
    return {name: [c.token_ids for c in output.outputs] for name, output in outputs.items()}


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"max_tokens_per_step": 7}, {"kv_blocks": 12}], ids=["whole", "chunked", "preempted"])
def test_tokens_are_the_cpu_devices(checkpoint, name, options):
    model = checkpoint(name)
    expected = run(model, "cpu", dtype="float32", **options)
    assert tokens(run(model, "cuda", dtype="float32", **options)) == tokens(expected)


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_near(checkpoint, name):
    """The most likely next tokens after each prompt and their logprobs."""
    model = checkpoint(name)
    asked = greedy(max_tokens=1, logprobs=5)
    expected, got = (run(model, device, asked, dtype="bfloat16") for device in ("cpu", "cuda"))
    for number in expected:
        one, other = expected[number].outputs[0].logprobs[0], got[number].outputs[0].logprobs[0]
        for token in set(one) & set(other):
            assert abs(one[token].logprob - other[token].logprob) < 0.15
        assert len(set(one) & set(other)) >= 3


@needs_gpu
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral-window"])
def test_mixed_steps_through_flash_are_near(checkpoint, monkeypatch, name):
    """Chunks of prompts beside decoding rows: all rows of several tokens through flash, and none."""
    from kernel_cuda.attention import CudaAttention
    from kernel_cuda.split import Rule

    model, asked = checkpoint(name), greedy(max_tokens=6, logprobs=5)
    outputs, calls = [], []
    called = CudaAttention._called
    monkeypatch.setattr(CudaAttention, "_called", lambda *args: calls.append(1) or called(*args))
    for rule in (Rule(0, 0), Rule(0, 1e18)):
        monkeypatch.setattr("kernel_cuda.attention.CudaAttention", partial(CudaAttention, rule=rule))
        outputs.append(
            run(model, "cuda", asked, dtype="bfloat16", max_tokens_per_step=24, plugins={"cuda": {"mixed_flash": True}})
        )
        assert bool(calls) == (not rule.launches)
        calls.clear()
    for number, expected in outputs[1].items():
        one, other = (output.outputs[0].logprobs[0] for output in (expected, outputs[0][number]))
        assert len(set(one) & set(other)) >= 3
        assert all(abs(one[token].logprob - other[token].logprob) < 0.15 for token in set(one) & set(other))


@needs_gpu
def test_samples_are_the_cpu_devices(checkpoint):
    asked = SamplingParams(temperature=1.0, seed=3, top_p=0.9, top_k=30, max_tokens=16, ignore_eos=True, detokenize=False)
    model = checkpoint("llama")
    expected, got = (tokens(run(model, device, asked, dtype="float32")) for device in ("cpu", "cuda"))
    assert got == expected


@needs_gpu
def test_graphs_change_nothing(checkpoint):
    model = checkpoint("llama")
    with_graphs = tokens(run(model, "cuda", dtype="float32"))
    assert tokens(run(model, "cuda", dtype="float32", plugins={"cuda": {"graphs": False}})) == with_graphs


@needs_gpu
def test_an_fp8_cache_is_near(checkpoint):
    model = checkpoint("llama")
    asked = greedy(max_tokens=1, logprobs=5)
    plain, small = (run(model, "cuda", asked, dtype="bfloat16", plugins={"cuda": {"kv_dtype": k}}) for k in ("auto", "fp8"))
    apart = []
    for number in plain:
        one, other = plain[number].outputs[0].logprobs[0], small[number].outputs[0].logprobs[0]
        apart += [abs(one[token].logprob - other[token].logprob) for token in set(one) & set(other)]
    assert len(apart) > 20 and sum(apart) / len(apart) < 0.2 and max(apart) < 1.0  # e4m3 keeps three bits of a number


ALL_IN_GRAPHS = {"model_graphs": True, "fused_steps": True}


@needs_gpu
@pytest.mark.parametrize("cuda", [{}, {"graphs": False}, ALL_IN_GRAPHS], ids=["graphs", "none", "model and fused"])
@pytest.mark.parametrize(
    "asked",
    [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.8}, {"temperature": 0, "repetition_penalty": 1.2, "logprobs": 2}],
    ids=["greedy", "filtered", "penalised"],
)
def test_a_steady_step_never_waits(asked, cuda):
    """CUDA raises where the host would wait for the device, but for reading a result when it is asked for."""
    options = dict(dtype="bfloat16", max_model_len=256, plugins={"cuda": cuda})
    with Engine(model="tiny-chat", device="cuda", **options) as engine:
        assert engine.core.loop.depth == 2
        params = engine.intake.params(**asked, max_tokens=60, ignore_eos=True)
        for number in range(3):
            engine.add_request(str(number), "Hello there", params)
        for _ in range(8):
            engine.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("cuda", [{}, ALL_IN_GRAPHS], ids=["as it is", "model and fused"])
@pytest.mark.parametrize("name", FEATURES_ALONE)
def test_features_give_the_plain_engines_answers(feature_on_cuda, name, cuda):
    assert feature_on_cuda(name, cuda)() == []


@needs_gpu
@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
def test_the_small_arrays_of_steps_are_those_of_the_runners_parts(options, monkeypatch):
    from kernel_cuda.device import CudaDevice
    from kernel_cuda.steps import FusedAcceptance, FusedDrafting, FusedInputs

    seen, ordinary = Counter(), CudaDevice.runner_parts
    parts = twins(FusedInputs, FusedAcceptance, FusedDrafting, seen) | {"steady": lambda runner: None}
    monkeypatch.setattr(CudaDevice, "runner_parts", lambda device: ordinary(device) | parts)
    check({"device": "cuda"} | options, seen, (REQUESTS | OTHERS).values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_told_and_nothing_of_cuda_is_imported():
    from kernel_cuda.probe import why_not

    assert why_not() is not None
    with pytest.raises(Exception, match=r"device = 'cuda': no device can run here\. cuda: "):
        Engine(model="tiny-chat", device="cuda")
