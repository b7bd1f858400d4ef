"""Prefix caching end to end: outputs are those of an engine without it, whatever was cached, and less is computed."""

import numpy as np
import pytest
import torch

from kernel_core import LLM, SamplingParams
from kernel_core.plan import NO_PREFIX_READ, NO_PREFIX_WRITE

BLOCK = 16
DRAW = np.random.default_rng(5)


def ids(count):
    return DRAW.integers(300, 900, count).tolist()


BASE, FORK, TAIL = ids(40), ids(3), ids(30)
#: they have 40, 32, 16 and 43 tokens in common, or nothing
PROMPTS = [BASE + FORK, BASE, BASE[:32], BASE + FORK + TAIL, BASE[:16] + TAIL, ids(20), BASE + ids(4), BASE[:35] + ids(2)]


def params(i, **more):
    kinds = [{"temperature": 0.0}, {"temperature": 1.2}, {"temperature": 0.9, "top_k": 8}]
    return SamplingParams(**{**kinds[i % 3], "seed": 50 + i, "max_tokens": 12, "ignore_eos": True, **more})


def made(**config):
    keys = {"dtype": "float32", "block_size": BLOCK, "max_model_len": 256, "plugins": {"prefix_caching": {}}, **config}
    return LLM("tiny-chat", device="cpu", **keys)


def tokens(outputs):
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [[completion.token_ids for completion in output.outputs] for output in outputs]


def greedy(llm, prompt, **more):
    (output,) = llm.generate([prompt], params(0, **more))
    return output


@pytest.fixture(scope="module")
def alone():
    """What every prompt gives without a cache."""
    with made(plugins={"prefix_caching": False}) as llm:
        outputs = [llm.generate(prompt, params(i))[0] for i, prompt in enumerate(PROMPTS)]
        assert [output.num_cached_tokens for output in outputs] == [0] * len(PROMPTS)
        assert greedy(llm, PROMPTS[0]).num_cached_tokens == 0
    return tokens(outputs)


@pytest.fixture(scope="module")
def shared():
    with made() as llm:
        yield llm


@pytest.fixture
def llm(shared):
    """One engine for all tests that need no other, empty."""
    shared.reset_cache()
    yield shared
    shared.engine.core.scheduler.check()


def computed(llm, run):
    """How many positions the steps of `run()` computed."""
    executor, counts = llm.engine.core.executor, []
    submit = executor.submit
    executor.submit = lambda plan: counts.append(int(plan.q.sum())) or submit(plan)
    try:
        run()
    finally:
        del executor.submit
    return sum(counts)


WAYS = {
    "as it is": {},
    "in chunks of 7": {"max_tokens_per_step": 7},
    "with a pool too small for all": {"kv_blocks": 9, "max_model_len": 96},
    "overlapped": {"overlap": True},
    "overlapped, in chunks, with a small pool": {"overlap": True, "max_prompt_chunk": 5, "kv_blocks": 9, "max_model_len": 96},
    "in a process of its own": {"executor": "worker_process"},
}


@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_those_without_a_cache(alone, way):
    each = [params(i) for i in range(len(PROMPTS))]
    with made(**WAYS[way]) as llm:
        assert tokens(llm.generate(PROMPTS, each)) == alone  # cold, in one batch
        again = llm.generate(PROMPTS[::-1], each[::-1])[::-1]
        assert tokens(again) == alone
        assert sum(output.num_cached_tokens for output in again) > 0
        if "pool" in way:
            assert llm.engine.core.scheduler.preemptions > 0
        one_by_one = [llm.generate(prompt, params(i))[0] for i, prompt in enumerate(PROMPTS)]
        assert tokens(one_by_one) == alone
        llm.engine.core.scheduler.check()


def test_a_full_hit_computes_the_last_token_only(llm):
    cold = greedy(llm, BASE[:32], max_tokens=1)
    assert (cold.num_cached_tokens, computed(llm, lambda: greedy(llm, BASE[:32], max_tokens=1))) == (0, 1)
    warm = greedy(llm, BASE[:32], max_tokens=1)
    assert warm.num_cached_tokens == 31 and tokens([warm]) == tokens([cold])


def test_a_partly_matching_block_is_copied(llm):
    greedy(llm, BASE + TAIL)  # fills the block of positions 32 to 47
    warm = greedy(llm, PROMPTS[0])  # 40 tokens in common: two blocks, and half of the third
    assert warm.num_cached_tokens == 40
    fork = greedy(llm, BASE[:20] + FORK)
    assert fork.num_cached_tokens == 20
    llm.reset_cache()
    assert tokens([warm, fork]) == tokens([greedy(llm, PROMPTS[0]), greedy(llm, BASE[:20] + FORK)])


def test_the_second_of_two_equal_prompts_waits_for_the_first(llm):
    pair = computed(llm, lambda: llm.generate([BASE, BASE], params(0, max_tokens=1)))
    assert pair == 40 + (40 - 32)
    llm.reset_cache()
    first, second, third = llm.generate([BASE, BASE, BASE[:32] + FORK], params(0))
    assert [o.num_cached_tokens for o in (first, second, third)] == [0, 32, 32]
    assert tokens([first]) == tokens([second])


def test_who_waits_goes_on_when_the_first_is_aborted():
    with made(max_prompt_chunk=4) as llm:
        engine = llm.engine
        for name in "ab":
            engine.add_request(name, BASE, params(0))
        engine.step()
        assert engine.core.scheduler.running == 1
        engine.abort("a")
        finished = {}
        while engine.has_unfinished_requests():
            finished.update((o.request_id, o) for o in engine.step() if o.finished)
        assert finished["b"].num_cached_tokens < 32
        assert [finished["b"].outputs[0].token_ids] == tokens([greedy(llm, BASE)])[0]
        engine.core.scheduler.check()


def test_the_next_turn_of_a_conversation_finds_the_output_too(llm):
    first = greedy(llm, BASE, max_tokens=28)
    history = BASE + first.outputs[0].token_ids
    assert len(history) == 68 and greedy(llm, history + FORK).num_cached_tokens == 64


def test_salts_keep_requests_apart(llm):
    plain = greedy(llm, BASE)
    a = greedy(llm, BASE, fields={"cache_salt": "a"})
    assert a.num_cached_tokens == 0
    assert greedy(llm, BASE, fields={"cache_salt": "b"}).num_cached_tokens == 0
    assert greedy(llm, BASE, fields={"cache_salt": "a"}).num_cached_tokens == 39
    assert tokens([plain]) == tokens([a])


def test_a_request_may_stay_out(llm):
    out = {"skip_prefix_cache": True}
    greedy(llm, BASE, fields=out)
    assert greedy(llm, BASE).num_cached_tokens == 0  # it left nothing
    assert greedy(llm, BASE, fields=out).num_cached_tokens == 0  # it takes nothing
    assert greedy(llm, BASE).num_cached_tokens == 39


def test_reset_forgets_everything(llm):
    greedy(llm, BASE)
    free = llm.engine.core.scheduler.free_blocks
    llm.reset_cache()
    assert llm.engine.core.scheduler.free_blocks == free
    assert greedy(llm, BASE).num_cached_tokens == 0


def test_reset_while_requests_run_keeps_what_they_compute_out():
    with made() as llm:
        engine = llm.engine
        engine.add_request("a", BASE, params(0, max_tokens=30))
        for _ in range(3):
            engine.step()
        engine.reset_cache()
        while engine.has_unfinished_requests():
            engine.step()
        assert greedy(llm, BASE).num_cached_tokens == 0


def test_prompt_logprobs_take_nothing_and_leave_theirs(llm):
    cold = greedy(llm, BASE, prompt_logprobs=1)
    warm = greedy(llm, BASE, prompt_logprobs=1)
    assert warm.num_cached_tokens == 0 and len(warm.prompt_logprobs) == 40
    for one, other in zip(cold.prompt_logprobs[1:], warm.prompt_logprobs[1:]):
        assert {t: p.rank for t, p in one.items()} == {t: p.rank for t, p in other.items()}
    assert greedy(llm, BASE).num_cached_tokens == 39


def test_completions_of_one_prompt_share_it_and_find_it_again(llm):
    three = params(1, n=3)
    with made(plugins={"prefix_caching": False}) as without:
        expected = tokens(without.generate(BASE, three))
    (cold,) = llm.generate(BASE, three)
    (warm,) = llm.generate(BASE, three)
    assert tokens([cold]) == tokens([warm]) == expected
    assert (cold.num_cached_tokens, warm.num_cached_tokens) == (0, 39)


def test_flags_of_the_kernel_are_set_by_the_fields(llm):
    accept = llm.engine.intake.accept
    made_ = accept("x", BASE, params(0, fields={"cache_salt": "s", "skip_prefix_cache": True})).requests[0]
    assert made_.flags & (NO_PREFIX_READ | NO_PREFIX_WRITE) == NO_PREFIX_READ | NO_PREFIX_WRITE and made_.identity
    plain = accept("x", BASE, params(0)).requests[0]
    assert plain.flags == 0 and plain.identity == b""


@pytest.mark.parametrize("overlap", [False, True])
def test_a_step_without_memory_costs_no_kept_block(alone, overlap):
    """What earlier steps filled is still found when the request is computed again."""
    with made(overlap=overlap) as llm:
        runner = llm.engine.core.executor._worker.runner
        inner, ran, failed = runner.graphs, [], []

        def small(forward):
            if len(forward.token_ids) > 40:
                failed.append(len(forward.token_ids))
                raise torch.OutOfMemoryError("told to")
            ran.append(len(forward.token_ids))
            return inner(forward)

        assert greedy(llm, PROMPTS[2]).num_cached_tokens == 0
        runner.graphs = small
        greedy(llm, PROMPTS[2] + ids(60))
        assert failed == [60] and sum(ran) == 60 + 11, "the 32 tokens of the hit were computed again"
        assert tokens(llm.generate(PROMPTS, [params(i) for i in range(len(PROMPTS))])) == alone
        assert greedy(llm, PROMPTS[2]).num_cached_tokens == 31
        llm.engine.core.scheduler.check()
