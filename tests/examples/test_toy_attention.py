"""The example device's attention and ops against the kernel's references, over random steps."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from kernel_core.nn import ops as references
from kernel_core.nn.api import AttentionBatch, AttentionSpec
from kernel_core.nn.reference_attention import ReferenceAttention

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "third_party_device"
HEADS, KV_HEADS, DIM = 4, 2, 8


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from toy_device import attention, kernels

    yield attention.ToyAttention(), kernels
    for name in [name for name in sys.modules if name.startswith("toy_device")]:
        del sys.modules[name]


def number(low: int, high: int) -> int:
    return int(torch.randint(low, high, ()))


def random_tree(q_start: list[int], context: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Each token of a row follows the row's first token, or a random path of those before it."""
    lengths = [stop - start for start, stop in pairwise(q_start)]
    tree, positions = torch.zeros(q_start[-1], max(lengths), dtype=torch.bool), []
    for row, length in enumerate(lengths):
        for token in range(length):
            at = q_start[row] + token
            if token:
                tree[at] = tree[q_start[row] + number(0, token)]
            tree[at, token] = True
            positions.append(context[row] + int(tree[at].sum()) - 1)
    return tree, torch.tensor(positions)


def random_batch(block_size: int, trees: bool) -> AttentionBatch:
    rows = number(1, 5)
    count, context = ([number(low, high) for _ in range(rows)] for low, high in ((1, 6), (0, 20)))
    q_start = [0, *torch.tensor(count).cumsum(0).tolist()]
    length = [c + q for c, q in zip(context, count)]
    blocks = -(-30 // block_size)
    table = (torch.randperm(rows * blocks) + 1).view(rows, blocks)
    slots = [
        int(table[row, p // block_size]) * block_size + p % block_size
        for row in range(rows)
        for p in range(context[row], length[row])
    ]
    slots = torch.tensor(slots).where(torch.rand(len(slots)) > 0.1, -1)
    tree, positions = random_tree(q_start, context) if trees else (None, None)
    return AttentionBatch(
        q_start=torch.tensor(q_start, dtype=torch.int32),
        kv_len=torch.tensor(length, dtype=torch.int32),
        block_table=table.int(),
        slot_mapping=slots,
        block_size=block_size,
        max_q=max(count),
        max_kv=max(length),
        tree=tree,
        positions=positions,
    )


@pytest.mark.parametrize("trees", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("window", [None, 1, 5, 13])
@pytest.mark.parametrize("seed", range(4))
def test_attention_equals_the_reference(toy, seed: int, window: int | None, trees: bool) -> None:
    torch.manual_seed(seed)
    mine, reference = toy[0], ReferenceAttention()
    block_size, v_dim = (4, 8)[seed % 2], (DIM, 6)[seed // 2]
    spec = AttentionSpec("l", HEADS, KV_HEADS, DIM, v_dim, 0.3, "full" if window is None else "window", window)
    batch = random_batch(block_size, trees)
    blocks = int(batch.block_table.max()) + 1
    own, theirs = (backend.allocate(spec, torch.float32, block_size, blocks) for backend in (mine, reference))
    for cache, flat, dim in zip(own, theirs, (DIM, v_dim)):
        flat.copy_(torch.randn(blocks * block_size, KV_HEADS, dim))
        cache.copy_(flat.view(blocks, block_size, KV_HEADS, dim).transpose(1, 2))
        unnamed = [b for b in range(blocks) if b not in batch.block_table]
        cache[unnamed] = flat.view(blocks, block_size, KV_HEADS, dim)[unnamed] = float("nan")
    tokens = len(batch.slot_mapping)
    q, k, v = torch.randn(tokens, HEADS, DIM), torch.randn(tokens, KV_HEADS, DIM), torch.randn(tokens, KV_HEADS, v_dim)
    got = mine.forward(q, k, v, own, mine.plan(batch, [spec]), spec, None)
    expected = reference.forward(q, k, v, theirs, reference.plan(batch, [spec]), spec, None)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for cache, flat in zip(own, theirs):
        assert torch.equal(cache.transpose(1, 2).flatten(0, 1).nan_to_num(7), flat.nan_to_num(7)), "the same slots are written"


def test_single_tokens_are_copied(toy) -> None:
    spec = AttentionSpec("l", HEADS, KV_HEADS, DIM, DIM, 0.3)
    kv = toy[0].allocate(spec, torch.float32, 4, 3)
    for cache in kv:
        cache.copy_(torch.randn(cache.shape))
    before = [cache.transpose(1, 2).flatten(0, 1).clone() for cache in kv]
    src, dst = torch.tensor([5, 6, 0]), torch.tensor([6, 9, 0])
    toy[0].copy_kv(kv, spec, src, dst)
    for old, cache in zip(before, kv):
        new = cache.transpose(1, 2).flatten(0, 1)
        assert torch.equal(new[[6, 9]], old[[5, 6]]), "read before written"
        assert torch.equal(new[[5, 4, 0]], old[[5, 4, 0]])


def test_ops_equal_their_references(toy) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)
    for extra in (None, residual):
        pairs = zip(toy[1].rms_norm(x, weight, 1e-5, extra), references.rms_norm(x, weight, 1e-5, extra))
        for got, expected in pairs:
            torch.testing.assert_close(got, expected)
    registry = references.Ops()
    reference = registry.resolve("silu_mul")
    toy[1].register(registry)
    assert registry.resolve("silu_mul") is toy[1].silu_mul
    assert registry.resolve("rms_norm", dtype=torch.float32, size=32, offset=1) is not toy[1].rms_norm
    torch.testing.assert_close(toy[1].silu_mul(x), reference(x))
