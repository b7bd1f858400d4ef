"""Prompt look-up and suffix automaton against their definitions in plain Python; what the drafter asks for and keeps."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_ngram import NgramSection
from kernel_ngram.drafter import NgramDrafter
from kernel_ngram.lookup import look_up, look_up_slots
from kernel_ngram.suffix import SuffixAutomaton
from pydantic import ValidationError

from kernel_core.nn.api import Drafter, DraftView, StepView

texts = st.lists(st.integers(0, 2), min_size=1, max_size=24)


def ends_before(text, length):
    """Where the last `length` tokens ended before the end of the text."""
    last = text[len(text) - length :]
    return [end for end in range(length - 1, len(text) - 1) if text[end - length + 1 : end + 1] == last]


def continued(text, end, number):
    """What follows `end`; where the text ends it repeats with the period that was found."""
    longer = list(text)
    while len(longer) <= end + number:
        longer.append(longer[len(longer) - (len(text) - 1 - end)])
    return longer[end + 1 : end + 1 + number]


def looked_up(text, least, most, number):
    for length in range(min(most, len(text) - 1), least - 1, -1):
        if ends := ends_before(text, length):
            return continued(text, ends[-1], number)
    return [-1] * number


@given(st.lists(texts, min_size=1, max_size=4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 6))
@settings(max_examples=150, deadline=None)
def test_look_up_follows_the_longest_then_the_most_recent_match(rows, least, more, number):
    table = torch.randint(0, 3, (len(rows), 26), dtype=torch.int32)  # behind the known tokens stands what was there before
    for row, text in zip(table, rows):
        row[: len(text)] = torch.tensor(text)
    known = torch.tensor([len(text) for text in rows])
    got = look_up(table, known, least, least + more, number)
    assert got.tolist() == [looked_up(text, least, least + more, number) for text in rows]


@given(texts, st.integers(1, 6))
@settings(max_examples=200, deadline=None)
def test_the_automaton_knows_the_longest_repeated_suffix_after_every_token(text, number):
    automaton = SuffixAutomaton()
    for size, token in enumerate(text, 1):
        automaton.extend(token)
        known = text[:size]
        longest = max((n for n in range(1, size) if ends_before(known, n)), default=0)
        assert automaton.length[automaton.repeated] == longest
        assert automaton.continuation(longest + 1, number) == []
        if longest:
            follows = automaton.continuation(longest, number)
            assert follows in [continued(known, end, number) for end in ends_before(known, longest)]


@given(texts.map(lambda text: text * 4))
@settings(max_examples=60, deadline=None)
def test_the_automaton_stays_linear(text):
    automaton = SuffixAutomaton()
    for token in text:
        automaton.extend(token)
    assert len(automaton.length) <= 2 * len(text)
    assert sum(map(len, automaton.follow)) <= 3 * len(text)


def view_of(texts, sampled, slots=None) -> DraftView:
    """A view after a step, of rows whose requests know `texts`."""
    slots = np.arange(len(texts))[::-1].copy() if slots is None else np.array(slots)
    history = torch.zeros(len(texts) + 2, 40, dtype=torch.int32)
    for slot, text in zip(slots, texts):
        history[slot, : len(text)] = torch.tensor(text)
    none, known = torch.zeros(0), torch.tensor([len(text) for text in texts])
    rows = torch.from_numpy(slots)
    step = StepView(*[rows, *[none] * 11], history, none, none, max_len=max(map(len, texts)) - 1)
    last = torch.tensor([text[-1] for text in texts])
    return DraftView(
        step, none, last, none, {}, torch.ones(len(texts)), known, none, slots, np.array(sampled), 99 * np.array(sampled)
    )


PERIODIC = [5, 1, 2, 3, 4, 9, 1, 2, 3, 4]


@pytest.mark.parametrize("method", ["lookup", "suffix"])
def test_only_rows_that_sampled_and_repeat_get_drafts(method):
    drafter = NgramDrafter(NgramSection(method=method, draft_tokens=3, adaptive=False), 8, look_up_slots)
    assert isinstance(drafter, Drafter) and drafter.width == 3
    assert drafter.needs_host == (method == "suffix")
    tokens, parents, count = drafter.propose(view_of([PERIODIC, PERIODIC, [1, 2, 3]], [True, False, True]))
    assert tokens.tolist() == [[9, 1, 2], [-1] * 3, [-1] * 3]
    assert parents.tolist() == [[-1, 0, 1]] * 3 and count.tolist() == [3, 0, 0]


def test_a_slot_forgets_its_request_and_catches_up_with_what_it_missed():
    drafter = NgramDrafter(NgramSection(method="suffix", draft_tokens=2, adaptive=False), 8, look_up_slots)
    drafter.propose(view_of([PERIODIC[:6]], [True], [1]))
    assert drafter.propose(view_of([PERIODIC], [True], [1]))[0].tolist() == [[9, 1]]
    drafter.closed(1)
    assert drafter.propose(view_of([[7, 8, 7, 8]], [True], [1]))[0].tolist() == [[7, 8]]


def test_adaptive_asks_for_as_many_as_pay():
    drafter = NgramDrafter(NgramSection(draft_tokens=3), 8, look_up_slots)
    drafter.length.lengths = lambda slots, most: np.array([1, 0], np.int32)[: len(slots)]
    assert drafter.propose(view_of([PERIODIC, PERIODIC], [True, True]))[0].tolist() == [[9, -1, -1], [-1] * 3]


@pytest.mark.parametrize(
    "section", [{"min_ngram": 5}, {"method": "suffix", "max_ngram": 4}, {"draft_tokens": 0}, {"method": "tree"}, {"ngram": 2}]
)
def test_sections_that_mean_nothing_are_refused(section):
    with pytest.raises(ValidationError):
        NgramSection(**section)


@pytest.mark.parametrize("module", ["kernel_ngram", "kernel_mlp_speculator"])
def test_entry_points_are_light(module):
    code = f"import sys, {module} as m; assert not {{'torch', 'transformers'}} & set(sys.modules); assert m.manifest.summary"
    subprocess.run([sys.executable, "-c", code], check=True)
