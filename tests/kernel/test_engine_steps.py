"""The engine's face over a device that computes nothing: tokens are a function of (key, position), text is the real codec's."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_text.codec import Codec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kernel_core.async_engine import AsyncEngine
from kernel_core.config import EngineConfig
from kernel_core.contexts import ModelInfo
from kernel_core.engine import Assembly, Engine, EngineCore, EngineParts
from kernel_core.errors import CapacityError, ConfigError, EngineDeadError, RequestError
from kernel_core.intake import Intake, Limits
from kernel_core.llm import LLM
from kernel_core.plan import Capabilities, KVGroup
from kernel_core.request import SamplingParams
from kernel_core.testing.null import NullExecutor, NullScript, null_tokens

LETTERS = "abcdefghijklmnop"
END = len(LETTERS)  # the end token's id
VOCAB = END + 1


@pytest.fixture(scope="session")
def codec(tmp_path_factory) -> Codec:
    path = tmp_path_factory.mktemp("letters")
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(LETTERS)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    return Codec(ModelInfo(str(path), "", {"eos_token_id": END}))


def make(codec: Codec, script: NullScript | None = None, model_len: int = 64, **config) -> Engine:
    settings_ = EngineConfig(**{"max_requests": 4, "max_tokens_per_step": 16, "kv_blocks": 40, **config})
    capabilities = Capabilities(async_submit=settings_.overlap is True)
    groups, limits = (KVGroup("full", 4, 1, ("x",)),), Limits(model_len, VOCAB, 20, seed=settings_.seed)
    executor = NullExecutor(groups, VOCAB, model_len, script=script, check_kv=True, capabilities=capabilities)

    def core(emit) -> EngineCore:
        return EngineCore(settings_, executor, emit)

    return Engine(assembly=Assembly(core, lambda core: Intake(limits, codec, (), {}), codec))


def drawn(key: int, position: int) -> int:
    return int(null_tokens(np.uint64(key), np.array([position]), VOCAB)[0])


def run(engine: Engine) -> dict:
    finished = {}
    while engine.has_unfinished_requests():
        finished.update((output.request_id, output) for output in engine.step() if output.finished)
        engine.core.scheduler.check()
    assert nothing_held(engine)
    return finished


def nothing_held(engine: Engine) -> bool:
    """Every block is free, now that nothing is in flight."""
    scheduler = engine.core.scheduler
    scheduler.kv.reclaim(scheduler.slots.last_plan)
    return scheduler.free_blocks == (engine.core.allocation.num_blocks[0] - 1,)


def expected(prompt: str, seed: int, max_tokens: int, stop: str | None = None) -> tuple[str, int, str]:
    """(text, tokens, finish reason) by the definition: a function of key and position alone."""
    text = ""
    for count in range(1, max_tokens + 1):
        token = drawn(seed, len(prompt) + count - 1)
        if token == END:
            return text, count, "stop"
        text += LETTERS[token]
        if stop and text.endswith(stop):
            return text.removesuffix(stop), count, "stop"
    return text, max_tokens, "length"


def seen(completion) -> tuple[str, int, str]:
    return completion.text, len(completion.token_ids), completion.finish_reason


requests = st.lists(
    st.tuples(
        st.text(LETTERS, min_size=1, max_size=20), st.integers(0, 50), st.integers(1, 30), st.sampled_from([None, "a", "b"])
    ),
    min_size=1,
    max_size=8,
)


@pytest.mark.parametrize("overlap", [False, True])
@settings(deadline=None, max_examples=40)
@given(asked=requests, blocks=st.integers(17, 40), chunk=st.sampled_from([None, 3]))
def test_every_request_gets_its_own_text_in_any_company(codec, overlap, asked, blocks, chunk):
    engine = make(codec, overlap=overlap, kv_blocks=blocks, max_prompt_chunk=chunk)
    for i, (prompt, seed, max_tokens, stop) in enumerate(asked):
        engine.add_request(str(i), prompt, SamplingParams(seed=seed, max_tokens=max_tokens, stop=stop))
    finished = run(engine)
    for i, (prompt, seed, max_tokens, stop) in enumerate(asked):
        assert seen(finished[str(i)].outputs[0]) == expected(prompt, seed, max_tokens, stop)


def test_steps_grow_the_output_and_leave_earlier_ones_as_they_were(codec):
    engine = make(codec)
    engine.add_request("x", "abc", SamplingParams(seed=5, max_tokens=6, ignore_eos=True))
    outputs = [output for _ in range(9) for output in engine.step()]
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == sorted(set(lengths)) and lengths[-1] == 6
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    timings = outputs[-1].timings
    assert 0 <= timings.queued < timings.first_token <= timings.finished


def test_n_completions_are_one_output_with_keys_seed_plus_index(codec):
    engine = make(codec)
    engine.add_request("x", "abcdefg", SamplingParams(n=3, seed=2**64 - 1, max_tokens=9))
    (output,) = run(engine).values()
    assert [c.index for c in output.outputs] == [0, 1, 2]
    assert [seen(c) for c in output.outputs] == [expected("abcdefg", key, 9) for key in (2**64 - 1, 0, 1)]


def test_a_stop_string_trims_text_and_tokens_and_says_which(codec):
    engine = make(codec)
    text = expected("ab", 3, 20)[0]
    stop = text[2:4]
    engine.add_request("x", "ab", SamplingParams(seed=3, max_tokens=20, stop=["zz", stop]))
    engine.add_request("y", "ab", SamplingParams(seed=3, max_tokens=20, stop=stop, include_stop_str_in_output=True))
    finished = run(engine)
    (short,), (whole,) = finished["x"].outputs, finished["y"].outputs
    assert (short.text, short.stop_reason, short.finish_reason) == (text[: text.index(stop)], stop, "stop")
    assert whole.text == short.text + stop and whole.token_ids == short.token_ids == codec.encode(whole.text)


def test_the_models_end_token_is_no_stop_reason_but_ones_own_is(codec):
    seed = next(seed for seed in range(200) if expected("ab", seed, 30)[2] == "stop")
    first = drawn(seed, 2)
    engine = make(codec)
    engine.add_request("end", "ab", SamplingParams(seed=seed, max_tokens=30))
    engine.add_request("own", "ab", SamplingParams(seed=seed, max_tokens=30, stop_token_ids=[first]))
    engine.add_request("shown", "ab", SamplingParams(seed=seed, stop_token_ids=[first], include_stop_str_in_output=True))
    engine.add_request("on", "ab", SamplingParams(seed=seed, max_tokens=30, ignore_eos=True))
    finished = run(engine)
    end, own, shown, on = (finished[name].outputs[0] for name in ("end", "own", "shown", "on"))
    assert (end.finish_reason, end.stop_reason, end.token_ids[-1]) == ("stop", None, END)
    assert (own.finish_reason, own.stop_reason, own.text, own.token_ids) == ("stop", first, "", [first])
    assert shown.text == LETTERS[first]
    assert on.finish_reason == "length" and len(on.token_ids) == 30


def test_without_detokenize_there_are_tokens_and_no_text(codec):
    engine = make(codec)
    engine.add_request("x", [0, 1], SamplingParams(seed=3, max_tokens=5, detokenize=False, ignore_eos=True))
    (output,) = run(engine).values()
    assert output.prompt is None and output.outputs[0].text == "" and len(output.outputs[0].token_ids) == 5


@pytest.mark.parametrize("overlap", [False, True])
def test_abort_gives_back_everything_and_its_id_may_be_used_again_at_once(codec, overlap):
    engine = make(codec, overlap=overlap)
    for name in ("x", "y"):
        engine.add_request(name, "abc", SamplingParams(seed=1, max_tokens=50, ignore_eos=True, n=2))
    for _ in range(4):
        engine.step()
    engine.abort("x")
    engine.add_request("x", "ab", SamplingParams(seed=3, max_tokens=4, ignore_eos=True))
    results = []
    while engine.has_unfinished_requests():
        results += [o for o in engine.step() if o.finished]
    aborted, again, other = results
    assert aborted.request_id == "x" and {c.finish_reason for c in aborted.outputs} == {"abort"}
    assert again.request_id == "x" and len(again.outputs[0].token_ids) == 4
    assert [len(c.token_ids) for c in other.outputs] == [50, 50]
    assert nothing_held(engine)


# ---- faults: each its own clear error, and the others as if alone -------------------------------------------------


INVALID = {
    "empty": ("", {}, "the prompt is empty"),
    "too long": ("a" * 64, {}, "64 tokens; max_model_len is 64 .* at most 63 fit"),
    "id beyond the vocabulary": ([0, VOCAB], {}, f"token id {VOCAB}, the model knows the ids 0 to {VOCAB - 1}"),
    "negative id": ([-1], {}, "token id -1"),
    "no tokens at all": ([[0, 1]], {}, "flat list of token ids"),
    "mapping without prompt": ({}, {}, 'needs "prompt"'),
    "mapping with a key nobody reads": ({"prompt": "a", "image": 1}, {}, "no enabled plugin reads"),
    "bad field": ("a", {"top_p": 2.0}, "top_p must be in"),
    "unknown field": ("a", {"temprature": 1.0}, "did you mean 'temperature'"),
    "field of a plugin that is not there": ("a", {"zzz": 1.0}, "may have to be enabled"),
    "too many logprobs": ("a", {"logprobs": 21}, "max_logprobs = 20"),
    "priority without a policy": ("a", {"priority": 1}, "needs a policy"),
    "stop token beyond the vocabulary": ("a", {"stop_token_ids": [99]}, "stop_token_ids has 99"),
}


@pytest.mark.parametrize("fault", INVALID)
def test_an_invalid_request_is_refused_and_nothing_of_it_remains(codec, fault):
    prompt, fields, message = INVALID[fault]
    engine = make(codec)
    engine.add_request("good", "abc", SamplingParams(seed=1, max_tokens=9))
    with pytest.raises(RequestError, match=message):
        engine.add_request("bad", prompt, SamplingParams.of(**fields))
    assert seen(run(engine)["good"].outputs[0]) == expected("abc", 1, 9)


def test_a_running_id_is_refused_and_its_owner_unharmed(codec):
    engine = make(codec)
    engine.add_request("x", "abc", SamplingParams(seed=1, max_tokens=9))
    with pytest.raises(RequestError, match="running already"):
        engine.add_request("x", "abd")
    assert seen(run(engine)["x"].outputs[0]) == expected("abc", 1, 9)


def test_a_request_that_fails_in_a_step_leaves_the_others_alone(codec):
    engine = make(codec, NullScript(fail={"bad": 6}))
    for name in ("good", "bad"):
        engine.add_request(name, "abc", SamplingParams(seed=1, max_tokens=9, ignore_eos=True))
    finished = run(engine)
    assert finished["bad"].error == "logits are not finite" and finished["bad"].outputs[0].finish_reason == "error"
    assert len(finished["bad"].outputs[0].token_ids) == 3
    assert finished["good"].error is None and len(finished["good"].outputs[0].token_ids) == 9


@pytest.mark.parametrize("overlap", [False, True])
def test_a_dead_worker_ends_every_request_with_the_reason_and_then_the_engine(codec, overlap):
    engine = make(codec, NullScript(die_at=4), overlap=overlap)
    for name in "xyz":
        engine.add_request(name, "abc", SamplingParams(seed=1, max_tokens=30, ignore_eos=True, n=2))
    finished = run_until_dead(engine)
    assert {output.error for output in finished} == {"the null worker died"} and len(finished) == 3
    for call in (engine.step, lambda: engine.add_request("w", "a"), lambda: engine.call("a.b")):
        with pytest.raises(EngineDeadError, match="the null worker died"):
            call()


def run_until_dead(engine: Engine) -> list:
    while True:
        finished = [output for output in engine.step() if output.finished]
        if finished:
            return finished


def test_a_length_that_does_not_fit_is_fitted_when_auto_and_refused_when_asked(codec):
    engine = make(codec, kv_blocks=9)
    assert engine.max_model_len == 32
    with pytest.raises(CapacityError, match=r"needs 17 blocks, engine.kv_blocks is 9; set engine.max_model_len to 32 or less"):
        make(codec, kv_blocks=9, max_model_len=64)


def test_overlap_with_a_drafter_that_needs_the_host_is_refused():
    from kernel_core.engine import choose_depth
    from kernel_core.plan import WorkerReport

    report = WorkerReport((), 0, Capabilities(async_submit=True), 1, 1, drafter_needs_host=True)
    with pytest.raises(ConfigError, match="overlap"):
        choose_depth(EngineConfig(overlap=True), report)
    assert choose_depth(EngineConfig(), report) == 1


# ---- seeds ---------------------------------------------------------------------------------------------------------


def test_an_engines_seed_repeats_a_run_and_gives_every_request_other_draws(codec):
    def once() -> list:
        engine = make(codec, seed=7)
        for name in "xyz":
            engine.add_request(name, "abc", SamplingParams(max_tokens=12, ignore_eos=True))
        return [output.outputs[0].token_ids for output in run(engine).values()]

    first, second = once(), once()
    assert first == second and len({tuple(ids) for ids in first}) == 3


# ---- LLM -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def llm(codec):
    with LLM(assembly=make_assembly(codec)) as made:
        yield made


def make_assembly(codec: Codec, script: NullScript | None = None) -> Assembly:
    return make(codec, script)._made


def test_outputs_keep_the_order_of_the_prompts(llm):
    prompts = ["abcdefghij" * 2, "a", {"prompt": "bc"}, {"prompt_token_ids": [1, 2], "prompt": "shown"}, [3], np.array([4, 5])]
    outputs = llm.generate(prompts, [SamplingParams(seed=i, max_tokens=20 - 3 * i) for i in range(6)])
    texts = ["abcdefghij" * 2, "a", "bc", "bc", "d", "ef"]
    assert [seen(o.outputs[0]) for o in outputs] == [expected(text, i, 20 - 3 * i) for i, text in enumerate(texts)]
    assert [o.prompt for o in outputs] == [texts[0], "a", "bc", "shown", None, None]


def test_one_prompt_may_come_alone_in_any_form(llm):
    for prompt in ("abc", [0, 1, 2], {"prompt": "abc"}, np.array([0, 1, 2])):
        (output,) = llm.generate(prompt, seed=9, max_tokens=5)
        assert output.prompt_token_ids == [0, 1, 2] and seen(output.outputs[0]) == expected("abc", 9, 5)


def test_nothing_starts_when_one_prompt_is_invalid(llm):
    with pytest.raises(RequestError, match="the prompt is empty"):
        llm.generate(["abc", ""])
    with pytest.raises(RequestError, match="2 prompts but 1 sampling params"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(RequestError, match="not both"):
        llm.generate("a", SamplingParams(), seed=1)
    assert not llm.engine.has_unfinished_requests() and llm.engine.core.scheduler.unfinished == 0


def test_a_failed_request_says_so_in_its_output_and_a_dead_engine_raises(codec):
    with LLM(assembly=make_assembly(codec, NullScript(fail={"0": 5}, die_at=30))) as llm:
        bad, good = llm.generate(["abc", "abc"], seed=1, max_tokens=8)
        assert bad.error == "logits are not finite" and seen(good.outputs[0]) == expected("abc", 1, 8)
        with pytest.raises(EngineDeadError, match="died"):
            llm.generate("abc", max_tokens=50, ignore_eos=True)


# ---- what plugins add to the engine


def with_calls(**verbs):
    made = {"limits": Limits(30, 100, 5)}

    def core(emit):
        parts = EngineParts(calls={"shop.price": lambda payload: payload * 2})
        executor = NullExecutor((KVGroup("full", 4, 1, ("f",)),), 100, 30)
        return EngineCore(EngineConfig(max_requests=2, kv_blocks=20), executor, emit, lambda report, allocation: parts)

    return Assembly(core, lambda core: Intake(made["limits"], None, (), {}), None, verbs=verbs)


def test_calls_of_the_engine_part_run_there_and_others_on_the_ranks():
    with Engine(assembly=with_calls()) as engine:
        assert engine.call("shop.price", b"12") == [b"1212"]
        assert engine.call("shop.tax", b"12") == [b"12"]  # the null device's ranks echo


def test_verbs_are_methods_of_llm_and_reach_registered_calls():
    def price(call, item, times=1):
        return call("shop.price", item.encode())[0].decode() * times

    with LLM(assembly=with_calls(price=price)) as llm:
        assert llm.price("ab", times=2) == "abababab"
        with pytest.raises(AttributeError, match="there is no method 'prize'; a plugin that offers it may have to be enabled"):
            llm.prize()


def test_verbs_of_an_async_engine_run_beside_the_event_loop():
    async def main():
        async with AsyncEngine(assembly=with_calls(price=lambda call, item: call("shop.price", item))) as engine:
            return await engine.verb("price", b"x"), await engine.call("shop.price", b"y")

    assert asyncio.run(main()) == ([b"xx"], [b"yy"])
