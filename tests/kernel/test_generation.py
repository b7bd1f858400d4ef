"""Real generation on the CPU: a request's tokens depend on nothing but itself, whatever runs beside it and however."""

import gc
import os
import signal
import threading
import time

import numpy as np
import pytest

from kernel_core import LLM, AsyncEngine, CapacityError, Engine, EngineDeadError, RequestError, SamplingParams
from kernel_core.intake import sampling_defaults

VOCAB = 260
NAN_TOKEN = 256


@pytest.fixture(scope="module")
def checkpoint(byte_model) -> str:
    return str(byte_model)


@pytest.fixture(scope="module")
def llm(checkpoint):
    with LLM(checkpoint, device="cpu") as made:
        yield made


PROMPTS = ["Hello", "The capital of France is", "x" * 60, "a", "To be, or not to be, that is", "\n"]


def params(i: int, **more) -> SamplingParams:
    """Different ones: greedy, and random with and without filters."""
    kinds = [{"temperature": 0.0}, {"temperature": 1.3}, {"temperature": 0.8, "top_k": 5}, {"temperature": 1.0, "top_p": 0.7}]
    return SamplingParams(**{**kinds[i % 4], "seed": 100 + i, "max_tokens": 20, "ignore_eos": True, **more})


def tokens(outputs) -> list[list[list[int]]]:
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


@pytest.fixture(scope="module")
def alone(llm) -> list[list[list[int]]]:
    """Each request by itself: what every other run must give."""
    return [tokens(llm.generate(prompt, params(i)))[0] for i, prompt in enumerate(PROMPTS)]


WAYS = {
    "together": {},
    "in chunks of 7": {"max_prompt_chunk": 7, "max_tokens_per_step": 16},
    "with a pool too small for all": {"kv_blocks": 9, "max_model_len": 96},
    "two at a time": {"max_requests": 2},
    "overlapped": {"overlap": True},
    "overlapped, in chunks, with a small pool": {"overlap": True, "max_prompt_chunk": 5, "kv_blocks": 9, "max_model_len": 96},
    "in a process of its own": {"executor": "worker_process"},
}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_do_not_depend_on_company_chunks_preemption_or_process(checkpoint, alone, way):
    with LLM(checkpoint, device="cpu", **WAYS[way]) as llm:
        assert tokens(llm.generate(PROMPTS, [params(i) for i in range(len(PROMPTS))])) == alone
        if "pool" in way:
            assert llm.engine.core.scheduler.preemptions > 0
        reverse = llm.generate(PROMPTS[::-1], [params(i) for i in range(len(PROMPTS))][::-1])
        assert tokens(reverse)[::-1] == alone
        llm.engine.core.scheduler.check()


def test_n_completions_are_those_of_the_seeds_that_follow(llm):
    (output,) = llm.generate("The capital of France is", params(1, n=3))
    single = [llm.generate("The capital of France is", params(1, seed=101 + j))[0] for j in range(3)]
    assert tokens([output])[0] == [tokens([one])[0][0] for one in single]
    assert len({tuple(ids) for ids in tokens([output])[0]}) == 3


def test_without_a_seed_every_request_is_another(llm):
    outputs = llm.generate(["Hello"] * 3, SamplingParams(temperature=1.5, max_tokens=12))
    assert len({tuple(ids) for (ids,) in tokens(outputs)}) == 3


# ---- logprobs -------------------------------------------------------------------------------------------------------


def test_logprobs_of_a_completion_are_the_prompt_logprobs_of_the_same_text(llm):
    (made,) = llm.generate("Hello, my name is", SamplingParams(temperature=0, max_tokens=10, logprobs=2, ignore_eos=True))
    completion = made.outputs[0]
    whole = made.prompt_token_ids + completion.token_ids
    (read,) = llm.generate(whole, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))
    assert read.prompt_logprobs[0] is None and len(read.prompt_logprobs) == len(whole)
    chosen = [entry[token] for token, entry in zip(completion.token_ids, completion.logprobs)]
    again = [entry[token] for token, entry in zip(whole[-10:], read.prompt_logprobs[-10:])]
    assert [one.rank for one in chosen] == [1] * 10 == [one.rank for one in again]
    np.testing.assert_allclose([one.logprob for one in chosen], [one.logprob for one in again], atol=1e-4)
    assert completion.cumulative_logprob == pytest.approx(sum(one.logprob for one in chosen))
    assert chosen[0].decoded_token == llm.engine.codec.token(completion.token_ids[0])


def test_the_sampled_token_is_always_among_its_logprobs(llm):
    (output,) = llm.generate("Hello", params(1, logprobs=1))
    completion = output.outputs[0]
    assert {len(entry) for entry in completion.logprobs} == {1, 2}
    for token, entry in zip(completion.token_ids, completion.logprobs):
        ranks = {logprob.rank for logprob in entry.values()}
        assert token in entry and 1 in ranks
        best = max(entry.values(), key=lambda logprob: logprob.logprob)
        assert best.rank == 1
    (none,) = llm.generate("Hello", params(1, logprobs=0))
    assert [list(entry) for entry in none.outputs[0].logprobs] == [[token] for token in completion.token_ids]


def test_logprobs_end_where_a_stop_string_ends_the_tokens(llm, alone):
    text = llm.engine.codec.decode(alone[0][0])
    (output,) = llm.generate(PROMPTS[0], params(0, logprobs=0, stop=text[3:5]))
    completion = output.outputs[0]
    assert completion.stop_reason == text[3:5] and completion.text == text[: text.index(text[3:5])]
    assert len(completion.logprobs) == len(completion.token_ids) < 20
    chosen = [entry[token].logprob for token, entry in zip(completion.token_ids, completion.logprobs)]
    assert completion.cumulative_logprob == pytest.approx(sum(chosen))


# ---- defaults, chat, plugins' fields ---------------------------------------------------------------------------------


def test_generation_config_gives_the_defaults_and_caps_the_output(llm, checkpoint):
    defaults = llm.get_default_sampling_params()
    assert (defaults.temperature, defaults.top_k, defaults.max_tokens) == (0.0, 7, 40)
    (output,) = llm.generate("Hello", temperature=1.0, seed=1, max_tokens=100, ignore_eos=True)
    assert len(output.outputs[0].token_ids) == 40
    with LLM(checkpoint, device="cpu", sampling_defaults="kernel") as plain:
        assert plain.get_default_sampling_params() == SamplingParams()


def test_what_generation_config_says_in_vain_is_named(caplog):
    said = {
        "temperature": 0.5,
        "num_beams": 4,
        "typical_p": 0.3,
        "use_cache": True,
        "_from_model_config": True,
        "eos_token_id": 3,
    }
    assert sampling_defaults(said, ["temperature"]) == {"temperature": 0.5}
    renamed = {"max_new_tokens": 9, "min_new_tokens": 2, "stop_strings": ["."]}
    assert sampling_defaults(renamed, ["max_tokens", "min_tokens", "stop"]) == {"max_tokens": 9, "min_tokens": 2, "stop": ["."]}
    assert [record.getMessage() for record in caplog.records] == [
        "generation_config.json: no enabled plugin reads num_beams, typical_p; ignored"
    ]


def test_a_chat_is_its_rendered_prompt(llm):
    conversation = [{"role": "user", "content": "Hello"}]
    one, two = llm.chat([conversation, conversation * 2], temperature=0, max_tokens=5)
    assert one.prompt == "[user]Hello[assistant]" and two.prompt == "[user]Hello[user]Hello[assistant]"
    (plain,) = llm.generate("[user]Hello[assistant]", temperature=0, max_tokens=5)
    assert tokens([one]) == tokens([plain]) == tokens(llm.chat(conversation, temperature=0, max_tokens=5))


def test_plugins_fields_are_validated_by_their_plugin(llm):
    (free,) = llm.generate("Hello", temperature=0, max_tokens=8)
    banned = free.outputs[0].token_ids[0]
    (output,) = llm.generate("Hello", temperature=0, max_tokens=8, logit_bias={banned: -100.0})
    assert banned not in output.outputs[0].token_ids
    with pytest.raises(RequestError, match="presence_penalty"):
        llm.generate("Hello", presence_penalty=9.0)


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_a_request_whose_logits_are_not_numbers_fails_alone(llm, alone):
    outputs = llm.generate([PROMPTS[0], [1, NAN_TOKEN, 2], PROMPTS[1]], [params(0), params(2), params(1)])
    assert "finite" in outputs[1].error or "NaN" in outputs[1].error
    assert outputs[1].outputs[0].finish_reason == "error" and outputs[1].finished
    assert tokens([outputs[0], outputs[2]]) == [alone[0], alone[1]]


def test_prompts_that_cannot_be_are_refused_with_their_numbers(llm, alone):
    for prompt, message in [("", "empty"), ([VOCAB], f"token id {VOCAB}"), ("x" * 256, "256 tokens; max_model_len is 256")]:
        with pytest.raises(RequestError, match=message):
            llm.generate([PROMPTS[0], prompt], params(0))
    assert tokens(llm.generate(PROMPTS[0], params(0))) == [alone[0]]


def test_a_model_that_does_not_fit_says_what_would(checkpoint):
    with pytest.raises(CapacityError, match=r"engine.max_model_len to .* or less, or raise engine.kv_memory"):
        Engine(model=checkpoint, device="cpu", kv_memory="64KiB", max_model_len=256)


def worker_pid(engine: Engine) -> int:
    return engine.core.executor._process.pid


def test_a_worker_that_is_killed_in_a_step_ends_all_requests_with_its_signal_in_bounded_time(checkpoint):
    engine = Engine(model=checkpoint, device="cpu", executor="worker_process")
    for i in range(3):
        engine.add_request(str(i), "Hello", params(i, max_tokens=200))
    for _ in range(3):
        engine.step()
    os.kill(worker_pid(engine), signal.SIGKILL)
    start, finished = time.monotonic(), []
    while not finished:
        finished = [output for output in engine.step() if output.finished]
    assert time.monotonic() - start < 10
    assert len(finished) == 3 and all("killed by SIGKILL" in output.error for output in finished)
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        engine.step()
    engine.close()


def test_a_killed_worker_reaches_those_who_await_it(checkpoint):
    import asyncio

    async def scenario() -> None:
        async with AsyncEngine(model=checkpoint, device="cpu", executor="worker_process") as engine:
            iterator = engine.generate("Hello", params(1, max_tokens=200))
            await anext(iterator)
            os.kill(worker_pid(engine._engine), signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                async for _ in iterator:
                    pass

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.fixture
def interruptible():
    """A runner in the background may have been started with Ctrl-C ignored. What earlier tests left is collected now, because an
    interrupt within a callback of the collector is lost."""
    gc.collect()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_call_and_leaves_the_llm_usable(llm, alone):
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        for _ in range(1000):
            llm.generate(PROMPTS, params(1, max_tokens=40))
    assert tokens(llm.generate(PROMPTS[0], params(0))) == [alone[0]]


def test_async_and_stream_give_the_same_tokens(llm, alone, checkpoint):
    *_, last = llm.stream(PROMPTS[1], params(1))
    assert tokens([last]) == [alone[1]]
    stream = llm.stream(PROMPTS[2], params(2))
    next(stream)
    stream.close()
    assert not llm.engine.has_unfinished_requests()
