"""The ops and the attention backend through the contract, against the references of the kernel."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_cuda import grouped
from kernel_cuda.attention import CudaAttention
from kernel_cuda.ops import register

from kernel_core.nn.api import AttentionBatch, AttentionSpec, HeadPreparation
from kernel_core.nn.ops import Ops, keeps_weight, prepare, rms_norm, rotary, route
from kernel_core.nn.reference_attention import ReferenceAttention

DTYPE = torch.float16


@pytest.fixture(scope="module")
def ops():
    made = Ops()
    register(made)
    return made


def near(ours, wanted, limit=3e-3):
    assert ours.shape == wanted.shape and ours.dtype == wanted.dtype
    assert (ours.double() - wanted.double()).norm() <= limit * wanted.double().norm()


def both(ops, name, **facts):
    return ops.resolve(name, **facts), Ops().resolve(name, **facts)


@pytest.mark.parametrize("name", ["silu_mul", "gelu_mul", "gelu_tanh_mul"])
def test_gated_activations(ops, device, name):
    ours, reference = both(ops, name, dtype=DTYPE, size=40)
    x = torch.randn(3, 80, device=device).to(DTYPE)
    near(ours(x), reference(x))


def test_norms_and_rotation(ops, device):
    x, w = torch.randn(3, 40, device=device).to(DTYPE), torch.randn(40, device=device).to(DTYPE)
    for name, facts, arguments in (("rms_norm", {"offset": 1}, (w, 1e-6, x, 1)), ("layer_norm", {}, (w, None, 1e-6, x))):
        ours, reference = both(ops, name, dtype=DTYPE, size=40, **facts)
        for a, b in zip(ours(x, *arguments), reference(x, *arguments)):
            near(a, b)
    ours, reference = both(ops, "rotary", dtype=DTYPE, head_dim=16, interleaved=True)
    q, k = torch.randn(3, 4, 16, device=device).to(DTYPE), torch.randn(3, 2, 16, device=device).to(DTYPE)
    tables = (torch.rand(9, 8, device=device), torch.rand(9, 8, device=device), torch.tensor([8, 0, 3], device=device))
    wanted = reference(q.clone(), k.clone(), *tables)
    for a, b in zip(ours(q, k, *tables), wanted):
        near(a, b)


@pytest.mark.parametrize(("kept", "limit"), [("plain", 3e-3), ("int8", 3e-3), ("e4m3", 4e-2), ("int4", 1.2e-1)])
@pytest.mark.parametrize("rows", [3, 300])
def test_linears(ops, device, kept, limit, rows):
    torch.manual_seed(0)
    op = ops.resolve("linear", format=kept, dtype=DTYPE, in_features=256, out_features=48, bias=True, tied=False)
    w, b, x = (torch.randn(*shape, device=device).to(DTYPE) for shape in ((48, 256), (48,), (rows, 256)))
    state = prepare(op, w, b)
    wanted = torch.nn.functional.linear(x.double(), w.double(), b.double()).to(DTYPE)
    if kept == "int8":
        reference = Ops().resolve("linear", format="int8")
        wanted = reference(x, prepare(reference, w, b))
    near(op(x, state), wanted, limit)
    assert keeps_weight(op) == (kept == "plain")


@pytest.mark.parametrize(("tokens", "multiplied"), [(5, 0), (16, 2)])
def test_many_rows_of_experts_are_multiplied_by_torch_where_it_can(ops, device, monkeypatch, tokens, multiplied):
    torch.manual_seed(0)
    calls, multiply = [], grouped.multiply
    monkeypatch.setattr(grouped, "works", lambda device, dtype: True)
    monkeypatch.setattr(grouped, "multiply", lambda *given: calls.append(given) or multiply(*given))
    monkeypatch.setattr("kernel_cuda.ops.MANY_OF_EXPERT", 8)
    ours, reference = both(ops, "moe", dtype=DTYPE, activation="silu", format="plain", num_experts=4)
    up, down = (torch.randn(*shape, device=device).to(DTYPE) * 0.1 for shape in ((4, 48, 32), (4, 32, 24)))
    x, logits = torch.randn(tokens, 32, device=device).to(DTYPE), torch.randn(tokens, 4, device=device).to(DTYPE)
    near(ours(x, logits, prepare(ours, up, down), 2, True), reference(x, logits, (up, down), 2, True), 5e-3)
    assert len(calls) == multiplied
    odd = prepare(ours, torch.randn(4, 40, 32, device=device).to(DTYPE), torch.randn(4, 32, 20, device=device).to(DTYPE))
    assert not odd[2]  # torch wants sizes of whole 16 bytes


def test_experts(ops, device):
    torch.manual_seed(0)
    ours, reference = both(ops, "moe", dtype=DTYPE, activation="silu", format="plain", num_experts=4)
    up, down = (torch.randn(*shape, device=device).to(DTYPE) * 0.1 for shape in ((4, 48, 32), (4, 32, 24)))
    x, logits = torch.randn(5, 32, device=device).to(DTYPE), torch.randn(5, 4, device=device).to(DTYPE)
    assert route(logits, 2, True)[1].shape == (5, 2)
    near(ours(x, logits, prepare(ours, up, down), 2, True), reference(x, logits, (up, down), 2, True), 5e-3)


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("window", "prepared"),
    [(None, True), pytest.param(9, False, marks=slow), pytest.param(None, False, marks=slow), pytest.param(9, True, marks=slow)],
)
def test_backend(device, window, prepared):
    """A step of a prefill, a decode and a row that writes nothing, in two layers with different numbers of heads."""
    torch.manual_seed(0)
    block, counts, lengths = 16, [9, 1, 1], [9, 35, 18]
    table = torch.tensor([[3, 1, 0], [2, 5, 4], [7, 6, 0]], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 9, 10, 11], dtype=torch.int32, device=device)
    positions = torch.cat([torch.arange(n - c, n) for n, c in zip(lengths, counts)]).to(device)
    row = torch.tensor([0] * 9 + [1, 2], device=device)
    slots = table[row, positions // block].long() * block + positions % block
    slots[10] = -1
    kind = "full" if window is None else "window"
    specs = [AttentionSpec(f"{heads}", heads, 2, 32, 32, 0.2, kind, window) for heads in (4, 6)]
    mine, theirs = CudaAttention(device, torch.float32), ReferenceAttention(device)
    batch = AttentionBatch(starts, torch.tensor(lengths, dtype=torch.int32, device=device), table, slots, block, 9, 35)
    plans = [backend.plan(batch, specs) for backend in (mine, theirs)]
    for spec in specs:
        caches = [backend.allocate(spec, torch.float32, block, 8) for backend in (mine, theirs)]
        assert sum(x.nbytes for x in mine.blocks(caches[0], spec, block)) == 8 * mine.bytes_per_block(spec, torch.float32, block)
        k, v = (torch.randn(8 * block, 2, 32, device=device) for _ in range(2))
        for ours, whole, theirs_part in zip((caches[0].k, caches[0].v), (k, v), caches[1]):
            ours.copy_(whole.view(8, block, 2, 32).transpose(1, 2))
            theirs_part.copy_(whole)
        qkv = torch.randn(11, spec.num_heads + 4, 32, device=device)
        q, k, v = qkv.split([spec.num_heads, 2, 2], 1)
        tables = torch.rand(40, 16, device=device), torch.rand(40, 16, device=device)
        weights = torch.rand(32, device=device), torch.rand(32, device=device)
        given = (q.clone(), k.clone(), v.clone())
        if prepared:
            normal = (rms_norm(x.reshape(-1, 32), w, 1e-6)[0].view(x.shape) for x, w in zip((q, k), weights))
            given = (*rotary(*normal, *tables, positions), v)
            heads = HeadPreparation(*tables, positions, False, *weights, 1e-6)
            out = mine.prepared_forward(q, k, v, caches[0], plans[0], spec, None, heads)
        else:
            out = mine.forward(q, k, v, caches[0], plans[0], spec, None)
        torch.testing.assert_close(out, theirs.forward(*given, caches[1], plans[1], spec, None), atol=2e-5, rtol=2e-5)
        mine.copy_kv(caches[0], spec, slots[:2], slots[2:4])
        theirs.copy_kv(caches[1], spec, slots[:2], slots[2:4])
        torch.testing.assert_close(caches[0].k.transpose(1, 2).flatten(0, 1), caches[1][0], atol=1e-5, rtol=1e-5)
