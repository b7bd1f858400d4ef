"""What the worker keeps by slot, and the shape of a step, on their own."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_worker import CPU

from kernel_core.nn.inputs import StepInputBuilder, ancestors, draft_paths, layout
from kernel_core.nn.slots import BlockTables, SlotTable
from kernel_core.plan import BlockUpdate, Opened, SamplingRow, StepPlan


def test_opening_forgets_the_former_owner_and_touches_no_other_slot():
    slots, tables = SlotTable(4, 20, 2, CPU), BlockTables(2, 4, 20, 4, CPU)
    row = SamplingRow(0.5, 7, 0.9, 0.1, 2, 1, 3)
    slots.drafts[:], slots.parents[:], slots.known[:] = 9, 0, 5
    ids = np.array([1, 3], np.int32)
    tables.update((BlockUpdate(ids, ids, ids), BlockUpdate(ids, ids, ids + 4)))
    slots.open([Opened(s, "r", np.array([4, 5, 6, 7][: s + 2], np.int32), s, 2**64 - 1 - s, row) for s in (1, 2)])
    tables.open(np.array([1, 2]))
    assert slots.known[:4].tolist() == [5, 3, 4, 5] and slots.computed[:4].tolist() == [0, 1, 2, 0]
    assert slots.drafts[:4].tolist() == [[9, 9], [-1, -1], [-1, -1], [9, 9]]
    assert slots.parents[:4].tolist() == [[0, 0], [-1, 0], [-1, 0], [0, 0]]
    assert slots.tokens[2, :4].tolist() == [4, 5, 6, 7] and slots.key[1:3].tolist() == [[-2, -1], [-3, -1]]
    assert slots.num_prompt[:4].tolist() == [0, 3, 3, 0] and slots.top_k[:4].tolist() == [0, 7, 7, 0]
    np.testing.assert_allclose(slots.top_p[:4], [0, 0.9, 0.9, 0])
    assert slots.host["logprobs"][:4].tolist() == [0, 2, 2, 0]
    assert [t.nonzero().tolist() for t in tables.tables] == [[[3, 3]]] * 2


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_the_layout_names_every_token_and_logits_row(rows):
    """rows: (known tokens to compute, room)."""
    known, room = (np.array(c, np.int32) for c in zip(*rows))
    q = known + np.maximum(room - 1, 0)
    zero = np.zeros(len(rows), np.int32)
    shape = layout(StepPlan(0, np.arange(len(rows), dtype=np.int32) + 10, zero + 5, q, room, zero, zero))
    tokens = [(r, j, j - known[r]) for r in range(len(rows)) for j in range(q[r])]
    assert list(zip(shape.row, shape.index, shape.draft)) == tokens
    sampled = [(r, r + 10, j, tokens.index((r, known[r] - 1 + j, j - 1))) for r in range(len(rows)) for j in range(room[r])]
    assert list(zip(shape.logits_row, shape.logits_slot, shape.logits_draft, shape.logits_token)) == sampled
    assert (shape.width, shape.max_q, shape.max_kv) == (max(room.max() - 1, 0), q.max(), 5 + q.max())


@st.composite
def trees(draw):
    width = draw(st.integers(1, 7))
    return [draw(st.integers(-1, d - 1)) for d in range(width)]


@given(trees())
def test_ancestors_are_the_path_to_the_root(parents):
    path = draft_paths(torch.tensor([parents, parents], dtype=torch.int32))
    rows = ancestors(path)[1].tolist()
    assert rows[0] == [-1] * len(parents)
    for d in range(len(parents)):
        walk, at = [], d
        while at >= 0:
            walk.insert(0, at)
            at = parents[at]
        assert rows[1 + d] == walk + [-1] * (len(parents) - len(walk))


def test_a_chain_needs_no_parents():
    builder = StepInputBuilder(SlotTable(3, 8, 5, CPU), BlockTables(1, 3, 8, 4, CPU), (), False)
    chain = torch.arange(-1, 3, dtype=torch.int32).repeat(3, 1)
    assert torch.equal(builder.chain_paths(3, 4), draft_paths(chain))
