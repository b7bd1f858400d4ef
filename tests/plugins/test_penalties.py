"""Penalties by their definitions in plain numpy, on a handmade step with drafts; fields refuse what is out of range."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_penalties.penalise import Penalise, occurred
from kernel_penalties.request import PenaltyFields, Preparer
from kernel_penalties.transform import Penalties
from pydantic import ValidationError

from kernel_core import LLM
from kernel_core.api import Opened, Prepared, SamplingParams, SamplingRow, decode, encode
from kernel_core.nn.api import LogitsTransform, StepView

V = 11
CPU = torch.device("cpu")


def definition(logits, prompt, output, presence, frequency, repetition):
    out = logits.astype(np.float64).copy()
    for t in range(V):
        if t in prompt or t in output:
            out[t] = out[t] / repetition if out[t] > 0 else out[t] * repetition
        out[t] -= frequency * output.count(t) + presence * (t in output)
    return out


def step_of(rows) -> StepView:
    """rows: (slot, prompt, output, drafts on the path) per logits row, each a row of its own."""
    history, known, num_prompt = torch.full((8, 20), 3, dtype=torch.int32), torch.zeros(8).int(), torch.zeros(8).int()
    ancestors, drafts = torch.full((len(rows), 3), -1).int(), torch.full((len(rows), 3), -1)
    for r, (slot, prompt, output, path) in enumerate(rows):
        tokens = [*prompt, *output]
        history[slot, : len(tokens)] = torch.tensor(tokens).int()
        known[slot], num_prompt[slot] = len(tokens), len(prompt)
        for i, token in enumerate(path):  # drafts 0 and 2 are the path, draft 1 is beside it
            ancestors[r, i], drafts[r, (0, 2)[i]] = (0, 2)[i], token
            drafts[r, 1] = 7
    slots, none = torch.tensor([s for s, *_ in rows]), torch.zeros(0)
    return StepView(
        *[slots, none, none, none, none, none, slots, torch.arange(len(rows)), none, none],
        ancestors=ancestors,
        drafts=drafts,
        history=history,
        known=known,
        num_prompt=num_prompt,
        host_slot=slots.numpy(),
        max_len=18,
    )


tokens = st.lists(st.integers(0, V - 1), max_size=6)
numbers = st.tuples(st.floats(-2, 2), st.floats(-2, 2), st.floats(0.2, 3))


@given(prompts=st.lists(st.tuples(tokens.filter(len), tokens, tokens.map(lambda t: t[:2]), numbers), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_each_row_follows_the_definition(prompts):
    transform = Penalties("penalties", 8, CPU, Penalise())
    assert isinstance(transform, LogitsTransform)
    names = ("presence_penalty", "frequency_penalty", "repetition_penalty")
    for slot, (*_, given_numbers) in enumerate(prompts):
        payloads = {"penalties": encode(dict(zip(names, given_numbers)))}
        assert transform.opened(Opened(slot, "r", np.zeros(1, np.int32), 0, 0, SamplingRow(), payloads))
    assert not transform.opened(Opened(7, "r", np.zeros(1, np.int32), 0, 0, SamplingRow(), {}))
    rows = [(slot, p, o, d) for slot, (p, o, d, _) in enumerate(prompts)] + [(7, [1, 2], [3], [])]
    logits = np.random.default_rng(0).normal(0, 3, (len(rows), V)).astype(np.float32)
    got = transform.apply(torch.from_numpy(logits.copy()), step_of(rows)).numpy()
    for row, (p, o, d, given_numbers) in enumerate(prompts):
        np.testing.assert_allclose(got[row], definition(logits[row], p, [*o, *d], *given_numbers), rtol=1e-5, atol=1e-5)
    assert (got[-1] == logits[-1]).all()


def test_rows_are_worked_on_in_parts(monkeypatch):
    monkeypatch.setattr("kernel_penalties.penalise.COUNTS_AT_ONCE", V)
    test_each_row_follows_the_definition()


def test_a_step_leaves_nothing_to_the_next_even_where_it_found_no_memory(monkeypatch):
    transform, rows = Penalties("penalties", 8, CPU, Penalise()), step_of([(0, [1, 2], [3, 3, 4], [3])])
    payloads = {"penalties": encode({"presence_penalty": 0.5, "frequency_penalty": 1.0, "repetition_penalty": 1.2})}
    transform.opened(Opened(0, "r", np.zeros(1, np.int32), 0, 0, SamplingRow(), payloads))
    first = transform.apply(torch.zeros(1, V), rows)
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("kernel_penalties.penalise.occurred", lambda *given, of=occurred: Refusing.of(*of(*given)))
        transform.apply(torch.zeros(1, V), rows)
    assert torch.equal(transform.apply(torch.zeros(1, V), rows), first)


def test_the_op_that_a_device_offers_is_taken(byte_model, monkeypatch):
    asked = []

    class Offered(Penalise):
        def __call__(self, logits, index, step, numbers):
            asked.append(index.tolist())
            return super().__call__(logits, index, step, numbers)

    sampling = {"temperature": 0, "max_tokens": 6, "repetition_penalty": 1.5}
    with LLM(str(byte_model)) as llm:
        expected = llm.generate("aaaa", **sampling)[0].outputs[0].token_ids
    monkeypatch.setattr("kernel_cpu.ops.register_history", lambda ops: ops.register("penalise", Offered(), owner="a device"))
    with LLM(str(byte_model)) as llm:
        assert llm.generate("aaaa", **sampling)[0].outputs[0].token_ids == expected
    assert asked == [[0]] * 6


class Refusing(torch.Tensor):
    """Tokens with which no memory is found for how often they occur."""

    @classmethod
    def of(cls, tokens, output):
        return tokens.as_subclass(cls), output

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.gather:
            raise torch.OutOfMemoryError("none is left")
        return super().__torch_function__(func, types, args, kwargs or {})


def prepare(**fields) -> dict[str, bytes]:
    request = Prepared("r", "", SamplingParams(), PenaltyFields(**fields).model_dump(), np.zeros(1, np.int32))
    Preparer("penalties").prepare(request)
    return request.payloads


def test_only_requests_that_ask_send_anything():
    assert prepare() == {} == prepare(repetition_penalty=1.0, presence_penalty=0)
    assert decode(prepare(presence_penalty=-2)["penalties"], dict)["presence_penalty"] == -2


@pytest.mark.parametrize(
    "field",
    [{"presence_penalty": 2.1}, {"frequency_penalty": -2.1}, {"repetition_penalty": 0}, {"repetition_penalty": float("inf")}],
)
def test_out_of_range_is_refused_by_name(field):
    with pytest.raises(ValidationError, match=next(iter(field))):
        PenaltyFields(**field)


@pytest.mark.parametrize("module", ["kernel_penalties", "kernel_logit_rules"])
def test_entry_points_import_no_torch(module):
    import subprocess

    code = f"import sys, {module}; assert 'torch' not in sys.modules, 'torch'; assert {module}.manifest.summary"
    subprocess.run([sys.executable, "-c", code], check=True)
