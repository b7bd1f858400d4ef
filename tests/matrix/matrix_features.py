"""What the matrix combines: each feature is configuration, request parameters, or something done while requests run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from typing import Any

from kernel_core import ConfigError, Engine, PluginError, RequestOutput
from kernel_core.api import StepRecord

MODEL = "tiny-chat"
DRAFTS = {"draft_tokens": 3, "adaptive": False}
SMALL = {"kv_blocks": 10, "max_model_len": 128}
ABORTED = "1"  # which request, with how many tokens
ABORT_TOKENS = 3

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "town": {"enum": ["Paris", "Rome"]}},
    "required": ["name", "town"],
    "additionalProperties": False,
}
#: by request; the other requests are free beside them
GUIDED: dict[int, dict[str, Any]] = {
    0: {"structured_outputs": {"json": PERSON}},
    2: {"structured_outputs": {"grammar": 'root ::= "one " item\nitem ::= "two " root | "three " root | "."'}},
    3: {"structured_outputs": {"choice": ["Paris", "Rome", "In Rome, as Bob does"]}},
    5: {"structured_outputs": {"regex": "(one |two |three ){2,9}[0-9]{4}"}},
}


@dataclass
class Run:
    """What a run showed: finished outputs in the order in which they ended, and what the steps had. It observes the engine."""

    outputs: dict[str, RequestOutput] = field(default_factory=dict)
    steps: int = 0
    preemptions: int = 0
    most_tokens: int = 0  # in a step
    jobs: set[str] = field(default_factory=set)  # "plugin:what"
    kinds: tuple[str, ...] = ()  # of loop and executor

    def added(self, arrival: object) -> None:
        pass

    def finished(self, *what: object) -> None:
        pass

    def step(self, record: StepRecord) -> None:
        self.steps += 1
        self.preemptions = record.preemptions
        self.most_tokens = max(self.most_tokens, int(record.plan.q.sum()))
        self.jobs |= {f"{job.plugin}:{job.key.split(':')[0]}" for job in record.plan.jobs}

    def __getitem__(self, name: str) -> int:
        """The sum of a field of all choices, or of all requests."""
        choices = [choice for output in self.outputs.values() for choice in output.outputs]
        return sum(getattr(one, name) for one in (choices if hasattr(choices[0], name) else self.outputs.values()))

    def text(self, request: int) -> str:
        return self.outputs[str(request)].outputs[0].text

    def place(self, request: int) -> int:
        """0: it was the first to end."""
        return list(self.outputs).index(str(request))


@dataclass(frozen=True)
class Feature:
    """`works` says whether a run with it alone shows it at work. `plugins` and `keys` configure the engine, `params` go into
    every request, `some` into those of these numbers, `priorities` gives each its own, `abort` ends one request midway."""

    works: Callable[[Run], object]
    plugins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    some: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    priorities: bool = False
    abort: bool = False


def accepted(run: Run) -> object:
    return 0 < run["num_accepted"] < run["num_drafted"]


def cached(run: Run) -> object:
    return run["num_cached_tokens"]


FEATURES: dict[str, Feature] = {
    "chunked prompts": Feature(lambda run: run.most_tokens == 7, keys={"max_tokens_per_step": 7}),
    "preemption": Feature(lambda run: run.preemptions > 1, keys=SMALL),
    "prefix_caching": Feature(cached, plugins={"prefix_caching": {}}),
    "kv_offload": Feature(
        lambda run: {"kv_offload:save", "kv_offload:load"} <= run.jobs,
        plugins={"kv_offload": {"host_gib": 0.05}, "prefix_caching": {}},
        keys=SMALL,
    ),
    "cache_aware": Feature(
        lambda run: run.place(5) < run.place(2), {"cache_aware": {}, "prefix_caching": {}}, {"max_requests": 2}
    ),
    "priority": Feature(lambda run: run.place(4) < run.place(1), {"priority": {}}, {"max_requests": 2}, priorities=True),
    "ngram": Feature(accepted, {"ngram": DRAFTS}),
    "mlp_speculator": Feature(accepted, {"mlp_speculator": {"head": "tiny-chat-mlp", **DRAFTS}}),
    "mlp_speculator tree": Feature(accepted, {"mlp_speculator": {"head": "tiny-chat-mlp", "tree": True, "adaptive": False}}),
    "draft_model": Feature(accepted, {"draft_model": {"model": "tiny-draft", **DRAFTS}}),
    "eagle": Feature(accepted, {"eagle": {"head": "tiny-chat-eagle", **DRAFTS}}),
    "eagle3": Feature(accepted, {"eagle": {"head": "tiny-chat-eagle3", **DRAFTS}}),
    "eagle3 tree": Feature(accepted, {"eagle": {"head": "tiny-chat-eagle3", "tree": True, "draft_tokens": 8, "adaptive": False}}),
    "n > 1": Feature(lambda run: len({c.text for c in run.outputs["3"].outputs}) == 3, params={"n": 3}),
    "logprobs": Feature(lambda run: run.outputs["1"].outputs[0].logprobs, params={"logprobs": 2, "prompt_logprobs": 1}),
    "abort midway": Feature(lambda run: run.outputs[ABORTED].outputs[0].finish_reason == "abort", abort=True),
    "worker_process": Feature(lambda run: "WorkerProcess" in run.kinds[1], keys={"executor": "worker_process"}),
    "overlapped loop": Feature(lambda run: "OverlappedLoop" in run.kinds, keys={"overlap": True}),
    "guided_decoding": Feature(
        lambda run: json.loads(run.text(0)).keys() == {"name", "town"}, {"guided_decoding": {}}, some=GUIDED
    ),
}

_TABLE = "name, town, year: Ann, Paris, 1990; Bob, Rome, 1991; Carl, Oslo, 1992; Dora, Kyiv, 1993; Eva, Lima, 1994. "
PROMPTS = [
    _TABLE + "Where does Bob live?",
    "<|user|>What does os.path.join do?<|end|><|assistant|>",
    "one two three one two three one two",
    _TABLE + "Where does Bob live?",
    "<|user|>What does os.getcwd do?<|end|><|assistant|>",
    _TABLE + "When was Eva born?",
    "<|user|>What is a town?<|end|><|assistant|>",
]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logit_bias": {300: 2.0}, "min_tokens": 4},
    {"temperature": 0.9, "seed": 6, "min_p": 0.05, "presence_penalty": 0.5},
    {"temperature": 0.0, "ignore_eos": False},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"temperature": 1.2, "seed": 7, "top_k": 40, "stop": ["about Py"]},
]
LENGTHS = (24, 20, 30, 24, 40, 20, 12)


def configuration(features: list[Feature], device: str) -> dict[str, Any]:
    """The engine's keys for these features together."""
    keys: dict[str, Any] = {"model": MODEL, "device": device, "dtype": "float32", "max_requests": 8, "max_model_len": 256}
    plugins: dict[str, Any] = {"prefix_caching": False}
    for feature in features:
        keys |= feature.keys
        plugins |= feature.plugins
    return {**keys, "plugins": plugins}


def parameters(features: list[Feature], index: int) -> dict[str, Any]:
    given: dict[str, Any] = {"max_tokens": LENGTHS[index], "ignore_eos": True, **SAMPLING[index]}
    for feature in features:
        given |= feature.params
        if index in feature.some:
            given |= {"ignore_eos": False, **feature.some[index]}
        if feature.priorities:
            given["priority"] = (3 * index) % 4
    if given.get("n", 1) > 1 and given["temperature"] == 0:
        given["n"] = 1
    return given


def run(features: list[Feature], device: str) -> dict[str, RequestOutput]:
    """The finished outputs of the workload."""
    return observed(features, device).outputs


def observed(features: list[Feature], device: str) -> Run:
    """The workload, some requests added while others run."""
    seen = Run()
    abort = any(feature.abort for feature in features)
    with Engine(**configuration(features, device)) as engine:
        seen.kinds = (type(engine.core.loop).__name__, type(engine.core.executor).__name__)
        engine.core.loop.outlet._observers.append(seen)
        waiting, started = list(range(len(PROMPTS))), False
        while waiting or engine.has_unfinished_requests():
            for index in waiting[: 1 if started else 4]:
                engine.add_request(str(index), PROMPTS[index], engine.intake.params(**parameters(features, index)))
                waiting.remove(index)
            started = True
            for output in engine.step():
                if output.finished:
                    seen.outputs[output.request_id] = output
                elif abort and output.request_id == ABORTED and len(output.outputs[0].token_ids) >= ABORT_TOKENS:
                    engine.abort(ABORTED)
        engine.core.scheduler.check()
    return seen


def differences(wanted: Mapping[str, RequestOutput], got: Mapping[str, RequestOutput], aborted: bool) -> list[str]:
    """What is not as in the plain engine; of an aborted request, what it has must be the beginning."""
    wrong = []
    for name, plain in wanted.items():
        mine = got[name]
        if mine.error:
            wrong.append(f"{name}: {mine.error}")
            continue
        for one, other in zip(plain.outputs, mine.outputs, strict=True):
            ids, midway = one.token_ids, aborted and name == ABORTED
            if midway:
                wrong += [] if other.finish_reason == "abort" else [f"{name} was not aborted"]
                ids = ids[: len(other.token_ids)]
            if ids != other.token_ids:
                wrong.append(f"{name}.{one.index}: {other.token_ids} instead of {ids}")
            elif not midway:
                ends = [(c.text, c.finish_reason, c.stop_reason) for c in (one, other)]
                wrong += [] if ends[0] == ends[1] else [f"{name}.{one.index}: {ends[1]} instead of {ends[0]}"]
            wrong += _logprob_differences(name, one.logprobs, other.logprobs)
        wrong += _logprob_differences(name, plain.prompt_logprobs, mine.prompt_logprobs)
    return wrong


def _logprob_differences(name: str, one: Any, other: Any) -> list[str]:
    for place, (a, b) in enumerate(zip(one or [], other or [])):
        if (a is None) != (b is None):
            return [f"{name}: logprobs at {place}"]
        if a and (list(a) != list(b) or any(abs(a[token].logprob - b[token].logprob) > 1e-3 for token in a)):
            return [f"{name}: logprobs at {place}: {b} instead of {a}"]
    return []


# ---- judging a pair


@dataclass(frozen=True)
class Verdict:
    """`refused`: the reason that the engine gave at start, else None; `differences` from the plain engine; `idle`: a feature
    alone was not seen at work."""

    refused: str | None = None
    differences: tuple[str, ...] = ()
    idle: bool = False


def pairs() -> list[tuple[str, str]]:
    """Every feature alone, as (name, name), and every two; two settings of one plugin are no pair."""

    def settings_of_one_plugin(one: str, other: str) -> bool:
        return bool(FEATURES[one].plugins) and FEATURES[one].plugins.keys() == FEATURES[other].plugins.keys()

    two = [pair for pair in combinations(FEATURES, 2) if not settings_of_one_plugin(*pair)]
    return [*((name, name) for name in FEATURES), *two]


@cache
def plain(asking: tuple[str, ...], device: str) -> dict[str, RequestOutput]:
    """The plain engine's outputs for the request parameters of these features."""
    return run([replace(FEATURES[name], keys={}) for name in asking], device)


def judge(one: str, other: str, device: str) -> Verdict:
    names = dict.fromkeys((one, other))
    features = [FEATURES[name] for name in names]
    asking = tuple(name for name in names if FEATURES[name].params or FEATURES[name].some)
    try:
        got = observed(features, device)
    except (ConfigError, PluginError) as error:
        return Verdict(refused=str(error))
    wrong = differences(plain(asking, device), got.outputs, any(feature.abort for feature in features))
    return Verdict(None, tuple(wrong), idle=one == other and not features[0].works(got))
