"""Drafts change speed, never output: whole engines with and without each drafter."""

import pytest

from kernel_core import LLM, SamplingParams

HEAD = "tiny-chat-mlp"
DRAFTERS = {
    "lookup": {"ngram": {"draft_tokens": 4, "min_ngram": 1, "adaptive": False}},
    "suffix": {"ngram": {"method": "suffix", "min_ngram": 1, "adaptive": False}},
    "chain": {"mlp_speculator": {"head": HEAD, "adaptive": False}},
    "tree": {"mlp_speculator": {"head": HEAD, "tree": True, "draft_tokens": 7, "adaptive": False}},
    "lookup, adaptive": {"ngram": {}},
    "tree, adaptive": {"mlp_speculator": {"head": HEAD, "tree": True}},
    "draft model": {"draft_model": {"model": "tiny-draft", "adaptive": False}},
    "eagle": {"eagle": {"head": "tiny-chat-eagle", "adaptive": False}},
    "eagle3": {"eagle": {"head": "tiny-chat-eagle3", "adaptive": False}},
    "eagle3, tree": {"eagle": {"head": "tiny-chat-eagle3", "tree": True, "draft_tokens": 7, "adaptive": False}},
    "eagle3, adaptive": {"eagle": {"head": "tiny-chat-eagle3"}},
}
ENGINES = {
    "wide": {},
    "prefix hits": {},
    "chunks of 7 tokens": {"max_tokens_per_step": 7},
    "preempting": {"kv_blocks": 10, "block_size": 16, "max_model_len": 128},
    "one step ahead": {"overlap": True},
    "no step ahead": {"overlap": False},
}
COMMON = {"model": "tiny-chat", "dtype": "float32", "max_model_len": 160, "max_requests": 8, "kv_memory": "32MiB", "threads": 1}
REPETITIVE = "os.path.join, os.path.split, os.path.join, os.path.split, os.path.join, os.path."


def asked() -> list[tuple[str, SamplingParams]]:
    """Greedy and seeded requests with everything that a request can ask for."""
    greedy, random = dict(temperature=0, max_tokens=24), dict(temperature=0.8, max_tokens=24)
    question = "<|user|>What does {} do?<|end|><|assistant|>".format
    return [
        (question("os.path.join"), SamplingParams.of(**greedy)),
        (REPETITIVE, SamplingParams.of(**greedy, ignore_eos=True)),
        (question("math.sqrt"), SamplingParams.of(**greedy, stop=["of", "zzz"], logprobs=2)),
        (REPETITIVE, SamplingParams.of(**greedy, repetition_penalty=1.3, frequency_penalty=0.4, ignore_eos=True)),
        (question("json.dumps"), SamplingParams.of(**random, seed=1)),
        (REPETITIVE, SamplingParams.of(**random, seed=2, min_p=0.05, logprobs=1, ignore_eos=True)),
        (question("shutil.copy"), SamplingParams.of(**random, seed=3, top_k=5, top_p=0.9, presence_penalty=0.5)),
        (question("textwrap.dedent"), SamplingParams.of(**random, seed=4, logit_bias={300: 2.0}, n=2)),
    ]


def outcome(output) -> list:
    """Everything of an output that drafts must not change."""
    parts = []
    for one in output.outputs:
        ranked = [list(step) for step in one.logprobs] if one.logprobs else None
        parts.append((list(one.token_ids), one.text, one.finish_reason, one.stop_reason, ranked))
    return parts


@pytest.fixture(scope="module")
def plain():
    with LLM(**COMMON) as llm:
        return [outcome(o) for o in llm.generate(*map(list, zip(*asked())))]


def count_drafts(llm: LLM) -> dict[str, int]:
    """Sums what the steps drafted and accepted, as they are committed."""
    totals, scheduler = {"drafted": 0, "accepted": 0}, llm.engine.core.scheduler
    commit = scheduler.commit

    def counting(plan, result):
        for name in totals:
            totals[name] += int(getattr(result, name).sum())
        return commit(plan, result)

    scheduler.commit = counting
    return totals


def marks(drafter: str, engine: str) -> list:
    """Which run in the fast tests."""
    also = {("lookup", "preempting"), ("tree", "chunks of 7 tokens"), ("eagle3", "preempting"), ("eagle3", "one step ahead")}
    fast = (engine == "wide" and "adaptive" not in drafter) or (drafter, engine) in also
    return [] if fast else [pytest.mark.slow]


PAIRS = [pytest.param(d, e, marks=marks(d, e)) for d in DRAFTERS for e in ENGINES if (d, e) != ("suffix", "one step ahead")]


@pytest.mark.parametrize("drafter, engine", PAIRS)
def test_output_is_that_of_the_plain_engine(drafter, engine, plain):
    cache = {"prefix_caching": {}} if engine == "prefix hits" else {}
    with LLM(**COMMON | ENGINES[engine], plugins=DRAFTERS[drafter] | cache) as llm:
        totals = count_drafts(llm)
        if cache:
            llm.generate(*map(list, zip(*asked())))
        got = [outcome(o) for o in llm.generate(*map(list, zip(*asked())))]
        preempted = llm.engine.core.scheduler.preemptions
    assert got == plain
    assert totals["drafted"] >= totals["accepted"]
    assert totals["accepted"] or "adaptive" in drafter
    assert preempted or engine != "preempting"


@pytest.mark.parametrize(
    "drafter", [d if d in ("lookup", "eagle3") else pytest.param(d, marks=pytest.mark.slow) for d in DRAFTERS]
)
def test_a_request_may_want_no_drafts_or_few(drafter, plain):
    """Its neighbours in the batch are drafted for as ever."""
    prompts, each = map(list, zip(*asked()))
    limits = [0, None, 0, 1, 0, None, 0, 0]
    for params, limit in zip(each, limits):
        params.max_drafts = limit
    with LLM(**COMMON, plugins=DRAFTERS[drafter]) as llm:
        outputs = llm.generate(prompts, each)
        steps = llm.draft_counts.steps
    assert [outcome(o) for o in outputs] == plain
    drafted = [sum(one.num_drafted for one in o.outputs) for o in outputs]
    assert not [n for n, limit in zip(drafted, limits) if n and limit == 0] and drafted[3] < 24
    if "adaptive" not in drafter:  # one that is drafts for whom it pays, as measured
        assert steps and all(n for n, limit in zip(drafted, limits) if limit != 0)
