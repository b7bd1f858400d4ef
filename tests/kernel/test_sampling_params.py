"""What a user may ask of sampling, and the sentence that refuses the rest."""

import pytest

from kernel_core.errors import RequestError
from kernel_core.request import SamplingParams


def test_plugin_fields_are_kept_apart():
    params = SamplingParams.of(temperature=0.5, presence_penalty=0.2)
    assert params.temperature == 0.5
    assert params.fields == {"presence_penalty": 0.2}


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ({"seed": -1}, "seed", None),
        ({"top_k": -1}, "top_k", 0),
        ({"temperature": 0.001}, "temperature", 0.01),
        ({"stop": "a"}, "stop", ["a"]),
    ],
)
def test_other_spellings_mean_the_same(given: dict, field: str, value: object):
    assert getattr(SamplingParams(**given), field) == value


def test_almost_zero_temperature_is_greedy_and_drops_the_filters():
    row = SamplingParams(temperature=1e-6, top_k=5, top_p=0.5, min_p=0.1).row(3, 100)
    assert (row.temperature, row.top_k, row.top_p, row.min_p, row.num_prompt_tokens) == (0.0, 0, 1.0, 0.0, 3)


def test_all_logprobs_means_the_whole_vocabulary():
    row = SamplingParams(logprobs=-1, prompt_logprobs=0).row(1, 100)
    assert (row.logprobs, row.prompt_logprobs) == (100, 0)


@pytest.mark.parametrize(
    "given",
    [
        {"n": 0},
        {"n": 2, "temperature": 0.0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": 1.5},
        {"max_tokens": 0},
        {"max_drafts": -1},
        {"max_drafts": "all"},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": "a", "detokenize": False},
        {"logprobs": -2},
        {"prompt_logprobs": -2},
        {"seed": 2**64},
        {"seed": "x"},
        {"stop": [1]},
        {"stop": 2},
        {"stop_token_ids": "x"},
        {"stop_token_ids": [1.5]},
        {"top_k": "many"},
        {"top_k": 2.5},
        {"max_tokens": True},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"ignore_eos": 3},
        {"priority": None},
    ],
)
def test_out_of_range_is_refused_by_name(given: dict):
    with pytest.raises(RequestError, match=next(iter(given))):
        SamplingParams(**given).validate()
    later = SamplingParams()
    for name, value in given.items():
        setattr(later, name, [value] if name == "stop" and isinstance(value, str) else value)
    with pytest.raises(RequestError, match=next(iter(given))):
        later.validate()
