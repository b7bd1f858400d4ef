from dataclasses import dataclass, field

import pytest
import torch
from kernel_cpu import attention as att
from kernel_cpu.backend import PagedAttention

from kernel_core.nn.api import AttentionBatch, AttentionSpec
from kernel_core.nn.reference_attention import ReferenceAttention

DTYPES = [torch.bfloat16, torch.float32]


@dataclass
class Batch:
    """Rows with their dense K and V, laid out at random over a cache whose other slots are poison."""

    lengths: list[int]
    q_lengths: list[int]
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    v_dim: int = 16
    block: int = 16
    dtype: torch.dtype = torch.float32
    poison: bool = True
    dense: list = field(default_factory=list)

    def __post_init__(self):
        needed = [-(-length // self.block) for length in self.lengths]
        self.width = max([*needed, 1]) + 1
        blocks = sum(needed) + 3
        self.kv = att.allocate_kv(blocks, self.block, self.kv_heads, self.dim, self.v_dim, self.dtype)
        if self.poison:
            self.kv.data.fill_(torch.nan)
        order = torch.randperm(blocks).tolist()
        self.table = torch.full((len(self.lengths), self.width), -1, dtype=torch.int32)
        for r, length in enumerate(self.lengths):
            mine = [order.pop() for _ in range(needed[r])]
            self.table[r, : needed[r]] = torch.tensor(mine, dtype=torch.int32)
            k = torch.randn(length, self.kv_heads, self.dim).to(self.dtype)
            v = torch.randn(length, self.kv_heads, self.v_dim).to(self.dtype)
            self.dense.append((k, v))
            att.write_kv(self.kv, k, v, self.slots(r))
        self.unused = order
        self.q = torch.randn(sum(self.q_lengths), self.heads, self.dim).to(self.dtype)
        self.scale = self.dim**-0.5

    def slots(self, r):
        at = torch.arange(self.lengths[r])
        return self.table[r].long()[at // self.block] * self.block + at % self.block

    def run(self, rows=None, q=None, q_lengths=None, lengths=None, **options):
        rows = range(len(self.lengths)) if rows is None else rows
        q_lengths = [self.q_lengths[r] for r in rows] if q_lengths is None else q_lengths
        starts = torch.tensor([0, *q_lengths]).cumsum(0).int()
        lengths = torch.tensor([self.lengths[r] for r in rows] if lengths is None else lengths, dtype=torch.int32)
        table = self.table[list(rows)].contiguous()
        return att.paged_attention(self.q if q is None else q, self.kv, starts, lengths, table, self.scale, **options)

    def reference(self, window=None, soft_cap=None, sinks=None, tree=None, causal=True, positions=None, first_slot=0):
        out, at = [], 0
        for r, count in enumerate(self.q_lengths):
            k, v = (x.double().repeat_interleave(self.heads // self.kv_heads, 1) for x in self.dense[r])
            for j in range(count):
                position = self.lengths[r] - count + j
                seen = torch.arange(self.lengths[r])
                is_tree = tree is not None and count <= tree.shape[1]
                mask = seen <= position if causal and not is_tree else torch.ones_like(seen, dtype=torch.bool)
                if window:
                    mask &= seen > (position if positions is None else positions[at]) - window
                if window and not causal and not is_tree:
                    mask &= seen < position + window
                mask &= seen >= first_slot
                if is_tree:
                    chunk = self.lengths[r] - count
                    mask[chunk:] &= tree[at, :count]
                s = torch.einsum("hd,nhd->hn", self.q[at].double(), k) * self.scale
                s = torch.tanh(s / soft_cap) * soft_cap if soft_cap else s
                s = s.masked_fill(~mask, -torch.inf)
                if sinks is not None:
                    s = torch.cat([s, sinks.double()[:, None]], 1)
                p = s.softmax(1)[:, : len(seen)] if mask.any() else torch.zeros(self.heads, len(seen), dtype=torch.double)
                out.append(torch.einsum("hn,nhd->hd", p, v))
                at += 1
        return torch.stack(out).to(self.q.dtype) if out else torch.empty(0, self.heads, self.v_dim, dtype=self.q.dtype)


def close(got, expected):
    assert got.dtype == expected.dtype
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if got.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 2e-5}
    torch.testing.assert_close(got, expected, **tolerance)


MIXED = {"lengths": [1, 70, 33, 130, 5, 600], "q_lengths": [1, 1, 33, 40, 0, 2]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 8, 1, 24, 64])
def test_mixed_batch(kernels, dtype, block):
    batch = Batch(**MIXED, block=block, dtype=dtype)
    close(batch.run(), batch.reference())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(14, 2, 64, 64), (8, 8, 128, 128), (12, 1, 256, 256), (4, 2, 24, 8), (2, 1, 72, 40), (64, 1, 16, 16)]
)
def test_head_shapes(kernels, dtype, shape):
    heads, kv_heads, dim, v_dim = shape
    batch = Batch([90, 20, 7], [1, 20, 3], heads, kv_heads, dim, v_dim, dtype=dtype)
    close(batch.run(), batch.reference())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [
    {"window": 1}, {"window": 17}, {"window": 64}, {"window": 1000}, {"soft_cap": 2.0}, {"causal": False}, {"sinks": True},
    {"window": 33, "soft_cap": 5.0, "sinks": True}, {"tree": True}, {"tree": True, "window": 40},
    {"causal": False, "window": 20}, {"first_slot": 1}, {"first_slot": 1, "tree": True}, {"first_slot": 1, "window": 70},
])  # fmt: skip
def test_options(kernels, dtype, options):
    batch = Batch(**MIXED, dtype=dtype)
    if "sinks" in options:
        options = {**options, "sinks": torch.randn(batch.heads)}
    if "tree" in options:
        tree = (torch.rand(len(batch.q), 35) < 0.4) | torch.eye(35, dtype=torch.bool).repeat(3, 1)[: len(batch.q)]
        own = torch.cat([torch.arange(n) for n in batch.q_lengths])
        tree[torch.arange(len(own)), own.clamp(max=34)] = True
        options = {**options, "tree": tree}
    close(batch.run(**options), batch.reference(**options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_behind_the_window_are_not_read(kernels, dtype):
    batch = Batch([200, 90], [1, 4], dtype=dtype)
    expected = batch.reference(window=30)
    batch.table[0, :10] = -1
    batch.table[1, :3] = 10**6
    close(batch.run(window=30), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 8, 1])
def test_slots_below_the_first_may_hold_anything(kernels, dtype, block):
    batch = Batch([1, 40, 9, 300], [1, 3, 9, 1], block=block, dtype=dtype)
    expected = batch.reference(first_slot=1)
    nothing = torch.full((4, batch.kv_heads, batch.dim), torch.nan, dtype=dtype)
    att.write_kv(batch.kv, nothing, nothing, batch.table[:, 0].long() * block)
    close(batch.run(first_slot=1), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_depends_on_its_own_row_alone(kernels, dtype):
    if kernels == "plain":
        pytest.skip("torch's products depend on the batch")
    batch = Batch(**MIXED, heads=14, dim=64, v_dim=64, dtype=dtype)
    for options in ({}, {"window": 50}, {"soft_cap": 3.0, "sinks": torch.randn(14)}):
        whole = batch.run(**options)
        starts = torch.tensor([0, *batch.q_lengths]).cumsum(0).tolist()
        for r in range(len(batch.lengths)):
            mine = slice(starts[r], starts[r + 1])
            assert torch.equal(batch.run([r], q=batch.q[mine], **options), whole[mine]), (r, options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_result_does_not_depend_on_chunking(kernels, dtype):
    if kernels == "plain":
        pytest.skip("torch's products depend on the batch")
    batch = Batch([1200], [1200], heads=7, kv_heads=1, dim=32, v_dim=32, dtype=dtype)
    for options in ({}, {"window": 600}):
        whole = batch.run(**options)
        for a, b in ((0, 1), (0, 7), (511, 513), (512, 513), (600, 777), (1199, 1200)):
            part = batch.run(q=batch.q[a:b], q_lengths=[b - a], lengths=[b], **options)
            assert torch.equal(part, whole[a:b]), (a, b, options)


def test_threads_do_not_change_the_result(kernels):
    from kernel_cpu import threads

    batch = Batch([3000], [2], dtype=torch.bfloat16)
    results = []
    try:
        for count in (1, 2, 5):
            threads.set_num_threads(count)
            results.append(batch.run())
    finally:
        threads.set_num_threads()
    close(results[0], batch.reference())
    assert all(torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [16, 5])
def test_write_read_copy(kernels, dtype, block):
    kv = att.allocate_kv(6, block, 3, 24, 8, dtype)
    assert kv.nbytes == kv.data.nbytes and not kv.data.any()
    k, v = torch.randn(9, 3, 24), torch.randn(9, 3, 8)
    slots = torch.randperm(6 * block)[:9]
    slots[4] = -1
    att.write_kv(kv, k, v, slots)
    keep = slots >= 0
    got_k, got_v = att.read_kv(kv, slots[keep])
    assert torch.equal(got_k, k[keep].to(dtype)) and torch.equal(got_v, v[keep].to(dtype))
    free = torch.tensor([s for s in range(6 * block) if s not in slots.tolist()])
    assert not att.read_kv(kv, free)[0].any() and not att.read_kv(kv, free)[1].any()
    att.copy_kv(kv, slots[:3], free[:3])
    assert torch.equal(att.read_kv(kv, free[:3])[0], k[:3].to(dtype))
    assert torch.equal(att.read_kv(kv, free[:3])[1], v[:3].to(dtype))
    assert not att.read_kv(kv, free[3:])[0].any()


def test_unreferenced_blocks_are_untouched(kernels):
    batch = Batch(**MIXED, dtype=torch.bfloat16)
    before = batch.kv.data.clone()
    batch.run()
    assert torch.equal(batch.kv.data.view(torch.int16), before.view(torch.int16))
    slots = batch.slots(1)[-1:]
    att.write_kv(batch.kv, torch.ones(1, 2, 16), torch.ones(1, 2, 16), slots)
    others = torch.arange(batch.kv.num_blocks) != slots // batch.block
    assert torch.equal(batch.kv.data[others].view(torch.int16), before[others].view(torch.int16))


def test_nan_ends_its_row_alone(kernels):
    batch = Batch([40, 40], [1, 1])
    k, v = batch.dense[0]
    k[3] = torch.nan
    att.write_kv(batch.kv, k, v, batch.slots(0))
    got = batch.run()
    assert got[0].isnan().all()
    close(got[1], batch.reference()[1])


def test_strided_queries_and_out(kernels):
    batch = Batch([30, 9], [2, 9], heads=4, kv_heads=2, dim=16, dtype=torch.bfloat16)
    fused = torch.randn(11, 8 * 16).to(torch.bfloat16)
    batch.q = fused[:, : 4 * 16].view(11, 4, 16)
    out = torch.empty(11, 4, 16, dtype=torch.bfloat16)
    assert batch.run(out=out) is out
    close(out, batch.reference())
    k = fused[:, 64:96].view(11, 2, 16)
    att.write_kv(batch.kv, k, k, torch.arange(11))
    assert torch.equal(att.read_kv(batch.kv, torch.arange(11))[0], k)


def test_nothing_to_do(kernels):
    batch = Batch([5, 3], [0, 0])
    assert batch.run().shape == (0, 4, 16)
    empty = att.paged_attention(
        torch.randn(0, 4, 16), batch.kv, torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32),
        torch.zeros(0, 1, dtype=torch.int32), 1.0,
    )  # fmt: skip
    assert empty.shape == (0, 4, 16)


def test_refusals(kernels):
    with pytest.raises(ValueError):
        att.allocate_kv(2, 16, 1, 12)
    with pytest.raises(TypeError):
        att.allocate_kv(2, 16, 1, 16, dtype=torch.float16)
    batch = Batch([5], [1])
    with pytest.raises(ValueError):
        batch.run(q=torch.randn(1, 4, 24))
    with pytest.raises(IndexError):
        batch.table[0, 0] = 1000
        batch.run()
    with pytest.raises(IndexError):
        att.copy_kv(batch.kv, torch.tensor([0]), torch.tensor([10**6]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plain", [False, True])
def test_where_drafts_branch_a_window_counts_positions_not_slots(dtype, plain, monkeypatch):
    if plain:
        monkeypatch.setattr(att.build, "library", lambda: None)
    torch.manual_seed(11)
    batch = Batch([90, 60], [7, 4], dtype=dtype)
    depths = torch.tensor([0, 1, 1, 2, 2, 3, 1, 0, 1, 1, 2])  # depth of every query below its row's last known token
    positions = depths + torch.tensor([83] * 7 + [56] * 4)
    tree = torch.rand(11, 7) < 0.5
    tree[torch.arange(11), torch.tensor([*range(7), *range(4)])] = True
    options = {"window": 20, "tree": tree, "positions": positions}
    expected = batch.reference(**options)
    torch.testing.assert_close(batch.run(**options), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
    by_slots = batch.reference(window=20, tree=tree)
    assert not torch.allclose(by_slots.float(), expected.float(), atol=1e-2)


@pytest.mark.parametrize("options", [
    {}, {"window": 20, "kind": "window"}, {"window": 20, "kind": "window", "causal": False}, {"causal": False}, {"first_slot": 1},
    {"first_slot": 3, "window": 9, "kind": "window", "causal": False},
])  # fmt: skip
def test_backend_sees_what_the_reference_backend_sees(kernels, options):
    rows, q_lengths, lengths, dim = 3, [1, 30, 4], [70, 30, 9], 16
    spec = AttentionSpec("layer", 4, 2, dim, dim, dim**-0.5, **options)
    table = torch.randperm(15).int().view(rows, 5)
    backends = [PagedAttention(), ReferenceAttention()]
    caches = [backend.allocate(spec, torch.float32, 16, 15) for backend in backends]
    for written in (lengths, q_lengths):  # first the whole rows, then their last tokens anew
        starts = torch.tensor([0, *written]).cumsum(0).int()
        at = torch.cat([torch.arange(n - w, n) for n, w in zip(lengths, written, strict=True)])
        row = torch.arange(rows).repeat_interleave(torch.tensor(written))
        slots = table[row, at // 16].long() * 16 + at % 16
        batch = AttentionBatch(starts, torch.tensor(lengths).int(), table, slots, 16, max(written), max(lengths))
        q, k, v = (torch.randn(sum(written), heads, dim) for heads in (4, 2, 2))
        results = [b.forward(q, k, v, kv, b.plan(batch, [spec]), spec, None) for b, kv in zip(backends, caches, strict=True)]
        seeing = at >= spec.first_slot  # the others may see nothing, and nobody reads their result
        close(results[0][seeing], results[1][seeing])
