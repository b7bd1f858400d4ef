"""The oracle backend against the formulas written out per head and query: windows, caps, sinks, GQA, Dv, trees, masking."""

import numpy as np
import pytest
import torch

from kernel_core.nn.protocols import AttentionBackend, AttentionBatch, AttentionSpec
from kernel_core.nn.reference_attention import ReferenceAttention

BS, HEADS, KV, D = 4, 6, 2, 8


def spec_of(**changed) -> AttentionSpec:
    return AttentionSpec(
        **{"layer": "a", "num_heads": HEADS, "num_kv_heads": KV, "head_dim": D, "v_head_dim": D, "scale": 0.3} | changed
    )


def formula(q, k, v, spec, seen, sinks):
    """One row: q [n, H, D], k, v [m, KV, *], seen [n, m] → [n, H, Dv]."""
    out = np.zeros((len(q), spec.num_heads, v.shape[-1]))
    for i in range(len(q)):
        for h in range(spec.num_heads):
            g = h // (spec.num_heads // spec.num_kv_heads)
            s = k[seen[i], g] @ q[i, h] * spec.scale
            s = spec.soft_cap * np.tanh(s / spec.soft_cap) if spec.soft_cap else s
            extra = np.exp(sinks[h]) if sinks is not None else 0.0
            out[i, h] = np.exp(s) @ v[seen[i], g] / (np.exp(s).sum() + extra)
    return out


def paged(spec, q_lens, kv_lens, seed=0, tree=None, positions=None, sinks=None, poison=False):
    """Run rows whose context lies in shuffled blocks → (ours, dense q, k, v per row)."""
    rng = np.random.default_rng(seed)
    backend, dv = ReferenceAttention(), spec.v_head_dim
    kv = backend.allocate(spec, torch.float32, BS, 64)
    if poison:
        for cache in kv:
            cache.fill_(float("nan"))
    free = rng.permutation(np.arange(1, 64)).tolist()
    tables = np.zeros((len(q_lens), 16), np.int32)
    rows, mapping = [], []
    for r, (n, m) in enumerate(zip(q_lens, kv_lens)):
        for c in range(-(-m // BS)):
            tables[r, c] = free.pop()
        slots = [int(tables[r, p // BS]) * BS + p % BS for p in range(m)]
        q, k, v = rng.normal(size=(n, HEADS, D)), rng.normal(size=(m, KV, D)), rng.normal(size=(m, KV, dv))
        kv[0][slots[: m - n]], kv[1][slots[: m - n]] = (torch.from_numpy(t[: m - n]).float() for t in (k, v))
        rows.append((q, k, v))
        mapping += slots[m - n :]
    q, k, v = (torch.from_numpy(np.concatenate([x[-n:] for x, n in zip(c, q_lens)])).float() for c in zip(*rows))
    starts = torch.tensor([0, *np.cumsum(q_lens)], dtype=torch.int32)
    lens, table = torch.tensor(kv_lens, dtype=torch.int32), torch.from_numpy(tables)
    batch = AttentionBatch(starts, lens, table, torch.tensor(mapping), BS, max(q_lens), max(kv_lens), tree, positions)
    out = backend.forward(q, k, v, kv, backend.plan(batch, [spec]), spec, sinks)
    return np.split(out.numpy(), np.cumsum(q_lens)[:-1]), rows


CASES = {
    "full": {},
    "window": {"kind": "window", "window": 5},
    "window of one": {"kind": "window", "window": 1},
    "soft cap": {"soft_cap": 2.0},
    "other value size": {"v_head_dim": 5},
    "not causal": {"causal": False},
    "sinks and window": {"sinks": True, "kind": "window", "window": 6},
}


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_mixed_batches_follow_the_formula(name, poison):
    """Decode, chunk and whole-prompt rows together; with `poison` everything outside the rows' own slots is NaN."""
    spec, q_lens, kv_lens = spec_of(**CASES[name]), [1, 7, 5, 3], [18, 7, 9, 30]
    sinks = torch.randn(HEADS) if spec.sinks else None
    got, rows = paged(spec, q_lens, kv_lens, sinks=sinks, poison=poison)
    for ours, (q, k, v), n, m in zip(got, rows, q_lens, kv_lens):
        place, key = np.arange(m - n, m)[:, None], np.arange(m)[None]
        seen = np.ones((n, m), bool) if not spec.causal else key <= place
        seen &= place - key < (spec.window or 10**9)
        np.testing.assert_allclose(ours, formula(q, k, v, spec, seen, None if sinks is None else sinks.numpy()), atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_tree_rows_see_their_path_and_windows_count_logical_positions(window):
    #  row: one known token, then drafts 0 ── 1, and 2 ── 3 beside it
    spec = spec_of(kind="window" if window else "full", window=window)
    depth = np.array([0, 1, 2, 1, 2])
    path = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]], bool)
    context = 9
    near = depth[:, None] - depth[None] < (window or 99)
    got, rows = paged(spec, [5], [context + 5], tree=torch.from_numpy(path & near), positions=torch.from_numpy(context + depth))
    before = (context + depth)[:, None] - np.arange(context)[None] < (window or 99)
    q, k, v = rows[0]
    np.testing.assert_allclose(got[0], formula(q, k, v, spec, np.hstack([before, path & near]), None), atol=1e-5)


def test_masked_tokens_are_not_written_and_copies_read_before_they_write():
    backend, spec = ReferenceAttention(), spec_of()
    assert isinstance(backend, AttentionBackend)
    kv = backend.allocate(spec, torch.float32, BS, 4)
    batch = AttentionBatch(
        torch.tensor([0, 2], dtype=torch.int32), torch.tensor([2]), torch.tensor([[1]]), torch.tensor([-1, 5]), BS, 2, 2
    )
    k = torch.ones(2, KV, D)
    backend.forward(torch.ones(2, HEADS, D), k, k * 2, kv, backend.plan(batch, [spec]), spec, None)
    assert kv[0].flatten(1).any(1).nonzero().flatten().tolist() == [5]
    kv[0][6] = 6.0
    backend.copy_kv(kv, spec, torch.tensor([5, 6, 0]), torch.tensor([4, 5, 0]))
    assert kv[0][4].eq(1).all() and kv[0][5].eq(6).all()


def test_what_a_query_does_not_see_cannot_break_it():
    """The second token of the row was not written, and its slot holds NaN: only the query that sees it is broken."""
    backend, spec = ReferenceAttention(), spec_of()
    kv = backend.allocate(spec, torch.float32, BS, 4)
    kv[0][5] = kv[1][5] = float("nan")
    batch = AttentionBatch(torch.tensor([0, 2]), torch.tensor([2]), torch.tensor([[1]]), torch.tensor([4, -1]), BS, 2, 2)
    k = torch.ones(2, KV, D)
    out = backend.forward(torch.ones(2, HEADS, D), k, k * 2, kv, backend.plan(batch, [spec]), spec, None)
    assert out[0].eq(2).all() and out[1].isnan().all()


def test_bytes_per_block_is_what_a_block_takes():
    backend, spec = ReferenceAttention(), spec_of(v_head_dim=5)
    kv = backend.allocate(spec, torch.bfloat16, BS, 10)
    assert backend.bytes_per_block(spec, torch.bfloat16, BS) * 10 == sum(t.nbytes for t in kv)
