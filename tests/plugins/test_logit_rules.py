"""What a request's rules become: checked on the face, in tokens for the worker. (Their effect on logits is tested in the
runner, under drafts.)"""

import numpy as np
import pytest
from kernel_logit_rules.request import Preparer, RuleFields, Rules
from pydantic import ValidationError

from kernel_core.api import BuildContext, KernelConfig, ModelInfo, Prepared, RequestError, SamplingParams, decode

VOCABULARY = 40


class Letters:
    """A tokenizer of single letters: a is 1, a space is 0."""

    eos_ids = frozenset({30})

    def encode(self, text, add_special_tokens=True):
        ids = [0 if c == " " else ord(c) - 96 for c in text]
        return [39, *ids] if add_special_tokens else ids


def prepare(params=None, **fields) -> Rules | None:
    model = ModelInfo("", "", {"vocab_size": VOCABULARY}, {"eos_token_id": [31, 32]})
    context = BuildContext("logit_rules", "face", None, KernelConfig(), model, lambda name: {"text/1": Letters()}[name])
    request = Prepared("r", "", params or SamplingParams(), RuleFields(**fields).model_dump(), np.zeros(1, np.int32))
    Preparer(context).prepare(request)
    payload = request.payloads.get("logit_rules")
    return payload and decode(payload, Rules)


def test_a_request_without_rules_sends_nothing():
    assert prepare() is None


def test_bad_words_are_banned_at_the_start_and_after_a_space():
    assert [ids.tolist() for ids in prepare(bad_words=["ab", " c"]).bad] == [[1, 2], [0, 1, 2], [0, 3]]


def test_bad_words_that_the_model_has_no_tokens_for_need_no_ban(monkeypatch):
    monkeypatch.setattr(Letters, "encode", lambda self, text, **options: [3, VOCABULARY] if "x" in text else [3, VOCABULARY - 1])
    assert [ids.tolist() for ids in prepare(bad_words=["x", "y"]).bad] == [[3, VOCABULARY - 1]]


@pytest.mark.parametrize(
    ("params", "stops"),
    [
        (SamplingParams(max_tokens=5), [30, 31, 32]),
        (SamplingParams(max_tokens=5, stop_token_ids=[7]), [7, 30, 31, 32]),
        (SamplingParams(max_tokens=5, stop_token_ids=[7, 10**6], ignore_eos=True), [7]),
    ],
)
def test_min_tokens_masks_what_would_end_the_request(params, stops):
    rules = prepare(params, min_tokens=3)
    assert (rules.until, rules.stops.tolist()) == (3, stops)


def test_biases_and_allowed_ids_cross_sorted():
    rules = prepare(logit_bias={"9": -100, "3": 1.5}, allowed_token_ids=[9, 3, 3])
    assert rules.bias_ids.tolist() == [3, 9] and rules.bias.tolist() == [1.5, -100] and rules.allowed.tolist() == [3, 9]
    assert rules.bias.dtype == np.float32 and not len(rules.stops)


@pytest.mark.parametrize("given", [{"logit_bias": {1: 101}}, {"min_tokens": -1}, {"allowed_token_ids": []}])
def test_out_of_range_fields_are_refused_by_name(given):
    with pytest.raises(ValidationError, match=next(iter(given))):
        RuleFields(**given)


@pytest.mark.parametrize(
    "given", [{"logit_bias": {VOCABULARY: 1}}, {"allowed_token_ids": [-1]}, {"bad_words": [" "]}, {"min_tokens": 17}]
)
def test_what_the_model_or_the_request_cannot_do_is_refused_by_name(given):
    with pytest.raises(RequestError, match=next(iter(given))):
        prepare(**given)
