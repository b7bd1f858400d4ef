"""Steps of all shapes through one graph: what it gives, and all that it leaves in the cache, is what the module itself does."""

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
import emulated_device

from kernel_core.nn.api import AttentionBatch, AttentionSpec, Forward

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda_device.py runs real graphs")
SPEC = AttentionSpec("a", 4, 2, 16, 16, 0.25, "full", None)
BLOCK, HELD, ROWS = 16, 4, 4
BLOCKS = 1 + HELD * ROWS


class Layer(nn.Module):
    """Attention of what token ids and positions are turned into, beside a tensor that the caller gives."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        draw = torch.Generator().manual_seed(0)
        self.table = torch.randn(50, 8, 16, generator=draw)

    def forward(self, fwd, states):
        q, k, v = (self.table[fwd.token_ids] + self.table[fwd.positions % 50]).split([4, 2, 2], 1)
        fwd.taps["q"] = q * 2
        return self.backend.forward(q.contiguous(), k, v, fwd.kv["a"], fwd.attention["a"], SPEC, None) + states


def steps(kind):
    """Forward, states; row r has blocks of its own, and grows from step to step, or falls back. "prompts": the last row has more
    tokens than the others together."""
    draw = torch.Generator().manual_seed(1)
    some = lambda low, high: int(torch.randint(low, high, (), generator=draw))  # noqa: E731
    for number in range(10):
        rows = torch.randperm(ROWS, generator=draw)[: 1 + number % ROWS]
        q = torch.tensor([some(1, 4) for _ in rows])
        if kind == "prompts":
            q[-1] = some(17, 45)
        start = torch.tensor([some(0, HELD * BLOCK - int(count)) for count in q])
        row = torch.arange(len(rows)).repeat_interleave(q)
        q_start = torch.cat([torch.zeros(1, dtype=torch.int64), q.cumsum(0)])
        place = start[row] + torch.arange(int(q.sum())) - q_start[row]
        table = (1 + HELD * rows[:, None] + torch.arange(HELD)).int()
        slots = table[row, place // BLOCK].long() * BLOCK + place % BLOCK
        width = int(q.max())
        sees = torch.ones(len(row), width).tril(-1).bool() | (torch.arange(width) == (place - start[row])[:, None])
        sees &= torch.arange(width) <= (place - start[row])[:, None]
        given = (sees, place) if kind == "tree" else (None, None)
        batch = AttentionBatch(q_start.int(), (start + q).int(), table, slots, BLOCK, width, HELD * BLOCK, *given)
        ids = torch.randint(0, 50, (len(row),), generator=draw)
        yield ids, place, batch, torch.randn(len(row), 4, 16, generator=draw)


@pytest.mark.parametrize("kind", ["causal", "tree", "prompts"])
@pytest.mark.parametrize("name", ["TensorAttention", pytest.param("CudaAttention", marks=pytest.mark.slow)])
@torch.inference_mode()
def test_a_graph_does_what_the_module_does(monkeypatch, name, kind):
    monkeypatch.setattr("kernel_cuda.kernels.attention.processors", lambda device: 1)
    monkeypatch.setattr("kernel_cuda.forward.LENGTHS", (HELD * BLOCK, 128))
    monkeypatch.setattr("kernel_cuda.forward.MIXED", (64,))  # one size, so that every step leaves another rest
    backend = getattr(emulated_device, name)(torch.device("cpu"), torch.float32)
    layer = Layer(backend)
    graphs = emulated_device.Counting(layer, emulated_device.Emulator(), 16, 1)
    graphs.sizes = [16]
    plain, other = (backend.allocate(SPEC, torch.float32, BLOCK, BLOCKS) for _ in range(2))
    kvs = {"a": plain}, {"a": other}
    for ids, place, batch, states in steps(kind):
        one, two = (Forward(ids, place, kv, {"a": backend.plan(batch, [SPEC])}) for kv in kvs)
        expected, got = layer(one, states), graphs(two, states)
        assert torch.allclose(got, expected, atol=1e-5)
        assert torch.equal(two.taps["q"], one.taps["q"])
        for kept, mine in ((plain.k, other.k), (plain.v, other.v)):
            assert torch.equal(kept[1:], mine[1:])  # the null block is anybody's
    assert graphs.ran == 10 and graphs._record.graphs <= 3


@torch.inference_mode()
def test_without_memory_for_a_graph_the_step_runs_as_it_is(caplog):
    asked = []

    def record(step):
        asked.append(step)
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")

    backend = emulated_device.TensorAttention(torch.device("cpu"), torch.float32)
    layer, kv = Layer(backend), {"a": backend.allocate(SPEC, torch.float32, BLOCK, BLOCKS)}
    graphs = emulated_device.ForwardGraphs(layer, record, 16, 1)
    for ids, place, batch, states in steps("causal"):
        fwd = Forward(ids, place, kv, {"a": backend.plan(batch, [SPEC])})
        assert torch.equal(graphs(fwd, states), layer(fwd, states))
    assert len(asked) == 1 and "no memory for more graphs of Layer" in caplog.text


@torch.inference_mode()
def test_graphs_end_with_the_kv_that_they_read():
    """A drafter's layers are made before KV is, and are run on the KV of the step that is measured."""
    backend = emulated_device.TensorAttention(torch.device("cpu"), torch.float32)
    layer = Layer(backend)
    graphs = emulated_device.Counting(layer, emulated_device.Emulator(), 16, 1)
    for _ in range(2):
        plain, mine = ({"a": backend.allocate(SPEC, torch.float32, BLOCK, BLOCKS)} for _ in range(2))
        for ids, place, batch, states in steps("causal"):
            one, two = (Forward(ids, place, kv, {"a": backend.plan(batch, [SPEC])}) for kv in (plain, mine))
            assert torch.allclose(graphs(two, states), layer(one, states), atol=1e-5)
    assert graphs.ran == 20 and graphs._record.graphs > len(graphs.graphs)
