"""What the matrix combines: each feature is configuration, request parameters, or something done while requests run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from typing import Any

from kernel_core import ConfigError, Engine, PluginError, RequestOutput

MODEL = "tiny-chat"
DRAFTS = {"draft_tokens": 3, "adaptive": False}

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "town": {"enum": ["Paris", "Rome"]}},
    "required": ["name", "town"],
    "additionalProperties": False,
}
#: by request; the other requests are free beside them
GUIDED: dict[int, dict[str, Any]] = {
    0: {"structured_outputs": {"json": PERSON}, "ignore_eos": False},
    2: {"structured_outputs": {"regex": "(one |two |three ){2,9}[0-9]{4}"}, "ignore_eos": False},
    3: {"structured_outputs": {"choice": ["Paris", "Rome", "In Rome, as Bob does"]}},
    4: {
        "structured_outputs": {"grammar": 'root ::= "one " item\nitem ::= "two " root | "three " root | "."'},
        "ignore_eos": False,
    },
}


@dataclass(frozen=True)
class Feature:
    """`plugins` and `keys` configure the engine, `params` go into every request, `some` into those of these numbers,
    `priorities` gives each its own, `abort` ends one request midway."""

    plugins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    keys: Mapping[str, Any] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    some: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    priorities: bool = False
    abort: bool = False


FEATURES: dict[str, Feature] = {
    "chunked prompts": Feature(keys={"max_tokens_per_step": 7}),
    "preemption": Feature(keys={"kv_blocks": 12, "max_model_len": 160}),
    "prefix_caching": Feature(plugins={"prefix_caching": {}}),
    "kv_offload": Feature(plugins={"kv_offload": {"host_gib": 0.05}, "prefix_caching": {}}, keys={"kv_blocks": 24}),
    "cache_aware": Feature(plugins={"cache_aware": {}, "prefix_caching": {}}),
    "priority": Feature(plugins={"priority": {}}, priorities=True),
    "ngram": Feature(plugins={"ngram": DRAFTS}),
    "mlp_speculator": Feature(plugins={"mlp_speculator": {"head": "tiny-chat-mlp", **DRAFTS}}),
    "mlp_speculator tree": Feature(plugins={"mlp_speculator": {"head": "tiny-chat-mlp", "tree": True, "adaptive": False}}),
    "draft_model": Feature(plugins={"draft_model": {"model": "tiny-draft", **DRAFTS}}),
    "eagle": Feature(plugins={"eagle": {"head": "tiny-chat-eagle", **DRAFTS}}),
    "eagle3": Feature(plugins={"eagle": {"head": "tiny-chat-eagle3", **DRAFTS}}),
    "eagle3 tree": Feature(plugins={"eagle": {"head": "tiny-chat-eagle3", "tree": True, "draft_tokens": 8, "adaptive": False}}),
    "n > 1": Feature(params={"n": 3}),
    "logprobs": Feature(params={"logprobs": 2, "prompt_logprobs": 1}),
    "abort midway": Feature(abort=True),
    "worker_process": Feature(keys={"executor": "worker_process"}),
    "overlapped loop": Feature(keys={"overlap": True}),
    "guided_decoding": Feature(plugins={"guided_decoding": {}}, some=GUIDED),
}

_TABLE = "name, town, year: Ann, Paris, 1990; Bob, Rome, 1991; Carl, Oslo, 1992; Dora, Kyiv, 1993; Eva, Lima, 1994. "
PROMPTS = [
    _TABLE + "Where does Bob live?",
    "What does os.path.join do?",
    _TABLE + "When was Eva born?",
    _TABLE + "Where does Bob live?",
    "one two three one two three one two",
    "Hi",
]
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"temperature": 0.9, "seed": 6, "min_p": 0.05, "presence_penalty": 0.5},
    {"temperature": 0.0, "logit_bias": {300: 2.0}, "min_tokens": 4},
    {"temperature": 1.2, "seed": 7, "top_k": 40, "stop": ["the"]},
]
LENGTHS = (24, 16, 20, 24, 30, 12)
ABORTED = 1  # which request, in which step
ABORT_STEP = 4


def configuration(features: list[Feature], device: str) -> dict[str, Any]:
    """The engine's keys for these features together."""
    keys: dict[str, Any] = {"model": MODEL, "device": device, "dtype": "float32", "max_requests": 8, "max_model_len": 256}
    plugins: dict[str, Any] = {"prefix_caching": False}
    for feature in features:
        keys |= feature.keys
        plugins |= feature.plugins
    return {**keys, "plugins": plugins}


def parameters(features: list[Feature], index: int) -> dict[str, Any]:
    given: dict[str, Any] = {**SAMPLING[index], "max_tokens": LENGTHS[index], "ignore_eos": index % 2 == 0}
    for feature in features:
        given |= {**feature.params, **feature.some.get(index, {})}
        if feature.priorities:
            given["priority"] = (3 * index) % 4
    if given.get("n", 1) > 1 and given["temperature"] == 0:
        given["n"] = 1
    return given


def run(features: list[Feature], device: str) -> dict[str, RequestOutput]:
    """The finished outputs of the workload, some requests added while others run."""
    outputs: dict[str, RequestOutput] = {}
    abort = any(feature.abort for feature in features)
    with Engine(**configuration(features, device)) as engine:
        waiting, steps = list(range(len(PROMPTS))), 0
        while waiting or engine.has_unfinished_requests():
            for index in waiting[: 4 if not steps else 1]:
                engine.add_request(str(index), PROMPTS[index], engine.intake.params(**parameters(features, index)))
                waiting.remove(index)
            if abort and steps == ABORT_STEP:
                engine.abort(str(ABORTED))
            outputs.update((output.request_id, output) for output in engine.step())
            steps += 1
        engine.core.scheduler.check()
    return outputs


def differences(wanted: Mapping[str, RequestOutput], got: Mapping[str, RequestOutput], aborted: bool) -> list[str]:
    """What is not as in the plain engine; of an aborted request, what it has must be the beginning."""
    wrong = []
    for name, plain in wanted.items():
        mine = got[name]
        if mine.error:
            wrong.append(f"{name}: {mine.error}")
            continue
        for one, other in zip(plain.outputs, mine.outputs, strict=True):
            ids = one.token_ids
            if aborted and name == str(ABORTED):
                ids = ids[: len(other.token_ids)]
            if ids != other.token_ids:
                wrong.append(f"{name}.{one.index}: {other.token_ids} instead of {ids}")
            elif not (aborted and name == str(ABORTED)):
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
    """`refused`: the reason that the engine gave at start, else None; `differences` from the plain engine."""

    refused: str | None = None
    differences: tuple[str, ...] = ()


def pairs() -> list[tuple[str, str]]:
    """Every feature alone, as (name, name), and every two; two settings of one plugin are no pair."""

    def settings_of_one_plugin(one: str, other: str) -> bool:
        return bool(FEATURES[one].plugins) and FEATURES[one].plugins.keys() == FEATURES[other].plugins.keys()

    two = [pair for pair in combinations(FEATURES, 2) if not settings_of_one_plugin(*pair)]
    return [*((name, name) for name in FEATURES), *two]


@cache
def plain(asking: tuple[str, ...], device: str) -> dict[str, RequestOutput]:
    """The plain engine's outputs for the request parameters of these features."""
    return run([FEATURES[name] for name in asking], device)


def judge(one: str, other: str, device: str) -> Verdict:
    names = dict.fromkeys((one, other))
    features = [FEATURES[name] for name in names]
    asking = tuple(name for name in names if FEATURES[name].params or FEATURES[name].some)
    try:
        got = run(features, device)
    except (ConfigError, PluginError) as error:
        return Verdict(refused=str(error))
    return Verdict(None, tuple(differences(plain(asking, device), got, any(feature.abort for feature in features))))
