"""Plans and results survive the wire exactly, and nothing but numbers, bytes and allowed arrays crosses it."""

from dataclasses import fields, is_dataclass

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernel_core import wire
from kernel_core.plan import (
    Ack,
    BlockUpdate,
    Copies,
    Job,
    Logprobs,
    Opened,
    SamplingRow,
    Span,
    StepPlan,
    StepResult,
)

ints = hnp.arrays(np.int32, st.integers(0, 5), elements=st.integers(-1, 2**31 - 1))
longs = hnp.arrays(np.int64, st.integers(0, 3), elements=st.integers(0, 2**40))
payloads = st.dictionaries(st.text(max_size=5), st.binary(max_size=8), max_size=2)
rows = st.builds(SamplingRow, st.floats(0, 2), st.integers(0, 9), st.floats(0.1, 1), st.floats(0, 1))
opened = st.builds(
    Opened, st.integers(0, 99), st.text(max_size=9), ints, st.integers(0, 99), st.integers(0, 2**64 - 1), rows, payloads
)
spans = st.builds(Span, st.integers(0, 9), st.integers(9, 20), st.binary(max_size=4), st.integers(0, 9), st.booleans())
plans = st.builds(
    StepPlan,
    st.integers(0, 2**40),
    ints,
    ints,
    ints,
    ints,
    ints,
    ints,
    opened=st.tuples(opened) | st.just(()),
    closed=ints,
    new_blocks=st.tuples(st.builds(BlockUpdate, ints, ints, ints)),
    copies=st.tuples(st.builds(Copies, longs, longs)) | st.just(()),
    encode=st.tuples(st.tuples(st.integers(0, 9), spans)) | st.just(()),
    jobs=st.tuples(st.builds(Job, st.text(max_size=3), st.text(max_size=3), st.binary(max_size=3))),
    payloads=payloads,
)
floats = hnp.arrays(np.float32, (2, 3), elements=st.floats(-99, 0, width=32))
logprobs = st.builds(Logprobs, ints, ints, hnp.arrays(np.int32, (2, 3)), floats, ints)
results = st.builds(
    StepResult,
    st.integers(0, 2**40),
    ints,
    ints,
    ints,
    ints,
    ints,
    ints,
    logprobs=st.none() | logprobs,
    outputs=st.tuples(st.tuples(st.integers(0, 9), st.text(max_size=3), floats)),
    acks=st.tuples(st.builds(Ack, st.text(max_size=3), st.text(max_size=3), st.none() | st.text(max_size=3))),
    lost=st.tuples(st.tuples(st.integers(0, 9), st.integers(0, 9))),
    failed=st.tuples(st.tuples(st.integers(0, 9), st.text(max_size=5))),
)


def same(a: object, b: object) -> bool:
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(plans)
def test_plan_round_trip(plan: StepPlan):
    assert same(wire.decode(wire.encode(plan), StepPlan), plan)


@given(results)
def test_result_round_trip(result: StepResult):
    assert same(wire.decode(wire.encode(result), StepResult), result)


def test_objects_are_refused():
    with pytest.raises(TypeError, match="cannot cross processes"):
        wire.encode({"x": object()})


def test_object_arrays_are_refused():
    data = msgspec.msgpack.encode(("|O", (1,), b"\x00" * 8))
    with pytest.raises((ValueError, msgspec.ValidationError), match="not allowed"):
        wire.decode(data, np.ndarray)


def test_a_result_is_not_a_plan():
    z = np.zeros(0, np.int32)
    with pytest.raises(msgspec.ValidationError):
        wire.decode(wire.encode(StepResult(1, z, z, z, z, z, z)), StepPlan)


def test_a_partial_result_crosses_as_that_of_the_whole_plan():
    a = lambda *values: np.array(values, np.int32)  # noqa: E731
    plan = StepPlan(7, a(4, 2, 9), a(5, 6, 7), a(1, 1, 1), a(1, 1, 1), a(0, 0, 0), a(0, 0, 0))
    logprobs = Logprobs(a(0, 1), a(6, 8), a([1], [2]), np.zeros((2, 1), np.float32), a(1, 1))
    part = StepResult(7, a(11, 12), a(0, 1, 2), a(6, 8), a(0, 0), a(0, 0), a(0, 0), logprobs)
    kept = np.array([True, False, True])
    assert plan.only(kept).rows.tolist() == [4, 9]
    whole = wire.decode(wire.encode(part.spread(plan, kept, False)), StepResult)
    assert whole.offsets.tolist() == [0, 1, 1, 2] and whole.tokens.tolist() == [11, 12]
    assert whole.computed.tolist() == [6, 0, 8] and whole.logprobs.row.tolist() == [0, 2]
    assert whole.lost == ((2, 6),) and not whole.oversized
