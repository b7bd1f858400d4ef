"""Composition is the promise: any two features together give the plain engine's output, or are refused before anything loads."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from matrix_features import FEATURES, judge, pairs

DOCUMENT = Path(__file__).parents[2] / "docs" / "composition.md"
DRAFTERS = [
    name for name, feature in FEATURES.items() if {"ngram", "mlp_speculator", "draft_model", "eagle"} & set(feature.plugins)
]
#: pairs that contradict each other → a word of the reason
REFUSED = dict.fromkeys(combinations(DRAFTERS, 2), "the drafter")


#: run with the fast tests, the others are slow: every feature occurs, but for heads and trees that cost as much again
FAST = {
    ("chunked prompts", "eagle3"),
    ("preemption", "kv_offload"),
    ("prefix_caching", "draft_model"),
    ("cache_aware", "n > 1"),
    ("priority", "abort midway"),
    ("ngram", "overlapped loop"),
    ("mlp_speculator", "logprobs"),
    ("worker_process", "guided_decoding"),
}


def marked(one: str, other: str) -> object:
    name = f"{one} + {other}" if one != other else one
    return pytest.param(one, other, id=name, marks=() if (one, other) in FAST else pytest.mark.slow)


@pytest.mark.parametrize(("one", "other"), [marked(*pair) for pair in pairs()])
def test_pairs_are_equal_to_the_plain_engine_or_refused(one, other, request):
    verdict = judge(one, other, request.config.getoption("--device", "cpu"))
    assert verdict.differences == () and not verdict.idle
    expected = REFUSED.get((one, other))
    assert (verdict.refused is None) == (expected is None), verdict.refused
    if expected:
        assert expected in verdict.refused
        assert all(name.split()[0].rstrip("3") in verdict.refused for name in (one, other))


def test_the_table_in_the_documentation_names_every_feature_and_refusal():
    text = DOCUMENT.read_text()
    assert [line.split("|")[1].split(maxsplit=1)[1].strip() for line in text.splitlines() if line[:3].strip("| ").isdigit()] == [
        *FEATURES
    ]
    refused = {line[2:].split(":")[0] for line in text.splitlines() if line.startswith("- ")}
    assert refused == {f"{one} + {other}" for one, other in pairs() if (one, other) in REFUSED}
