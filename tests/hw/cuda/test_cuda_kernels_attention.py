"""Paged attention against the formula, row by row in float64."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_cuda.kernels import attention
from kernel_cuda.kernels.attention import Cache, Rules

GPU = torch.cuda.is_available()
slow = pytest.mark.slow
gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
BLOCK = 16


def formula(q, k, v, own, position, rules, sinks, tree):
    """One row: q [n, Hq, D], its KV k [m, H, D], v [m, H, Dv]; own [n] slots and position [n]; tree [n, n] or None."""
    n, m, group = len(q), len(k), q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    s = torch.einsum("nhd,mhd->hnm", q, k) * rules.scale
    if rules.soft_cap:
        s = torch.tanh(s / rules.soft_cap) * rules.soft_cap
    at = torch.arange(m)
    near = torch.ones(n, m, dtype=torch.bool)
    if rules.window:
        near = at > position[:, None] - rules.window
        if not rules.causal:
            near &= at < position[:, None] + rules.window
    see = at <= own[:, None] if rules.causal else torch.ones(n, m, dtype=torch.bool)
    if tree is not None:
        near[:, m - n :] = True
        if rules.causal:
            see[:, m - n :] = tree
    see = see & near & (at >= rules.first_slot)
    s = s.masked_fill(~see, -torch.inf)
    if sinks is not None:
        s = torch.cat([s, sinks.double()[:, None, None].expand(-1, n, 1)], -1)
    w = s.softmax(-1)[..., :m].nan_to_num(0.0)
    v = torch.where(see.any(0)[:, None, None], v, 0.0)
    return torch.einsum("hnm,mhd->nhd", w, v)


def e4m3(x):
    """x [.., D] → bytes and a scale for the last dimension, as the cache keeps them."""
    scale = x.float().abs().amax(-1) / 448
    return (x.float() / scale[..., None]).to(torch.float8_e4m3fn).view(torch.uint8), scale


def store(cache, k, v, slots):
    """k [T, H, D], v [T, H, Dv] at slots, where those are not -1."""
    keep = slots >= 0
    block, at = slots[keep] // BLOCK, slots[keep] % BLOCK
    for number, (part, x) in enumerate(((cache.k, k), (cache.v, v))):
        x, scale = (x, None) if cache.scales is None else e4m3(x)
        part[block, :, at] = x[keep].to(part.device)
        if scale is not None:
            cache.scales[block, :, at, number] = scale[keep].to(part.device)


def kept(x):
    data, scale = e4m3(x)
    return data.view(torch.float8_e4m3fn).float() * scale[..., None]


def run(device, lengths, counts, dtype=torch.float32, heads=4, kv_heads=2, dim=16, v_dim=None, rules=None, sinks=False,
        tree=False, fp8=False, max_q=None, spread=False):  # fmt: skip
    """Fill a cache, attend, compare; the cache's unused slots hold NaN. Returns the outputs. The first rows' data do not
    depend on the others."""
    v_dim, rules = v_dim or dim, rules or Rules(dim**-0.5)
    rows, width = len(lengths), max(-(-n // BLOCK) for n in lengths)
    blocks = rows * width + 3
    order = torch.randperm(blocks - 1)[: rows * width] + 1
    table = torch.full((rows, width + 2), 1 << 30, dtype=torch.int32)  # beyond a row's length: must not be read
    for r, n in enumerate(lengths):
        table[r, : -(-n // BLOCK)] = order[r * width : r * width + -(-n // BLOCK)]
    shape = (blocks, kv_heads, BLOCK)
    if fp8:
        cache = Cache(
            torch.full((*shape, dim), 0x7F, dtype=torch.uint8, device=device),
            torch.full((*shape, v_dim), 0x7F, dtype=torch.uint8, device=device),
            torch.full((*shape, 2), torch.nan, device=device),
        )
    else:
        cache = Cache(*(torch.full((*shape, d), torch.nan, dtype=dtype, device=device) for d in (dim, v_dim)))
    torch.manual_seed(0)
    shapes = [((n, kv_heads, dim), (n, kv_heads, v_dim), (c, heads, dim)) for n, c in zip(lengths, counts)]
    rows_of = [[torch.randn(shape) for shape in row] for row in shapes]
    k, v, q = ([row[i].to(dtype) for row in rows_of] for i in range(3))
    slots = [table[r, torch.arange(n) // BLOCK].long() * BLOCK + torch.arange(n) % BLOCK for r, n in enumerate(lengths)]
    hole = rules.first_slot
    for r in range(rows):
        slots[r][: min(hole, lengths[r])] = -1
    store(cache, torch.cat(k), torch.cat(v), torch.cat(slots))
    tokens = sum(counts)
    q = torch.cat(q)
    q_start = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    kv_len = torch.tensor(lengths, dtype=torch.int32)
    sink = torch.randn(heads) if sinks else None
    links, positions = None, None
    if tree:
        links = torch.zeros(tokens, max(counts), dtype=torch.bool)
        positions = torch.cat([torch.arange(n - c, n) for n, c in zip(lengths, counts)])
        for r, c in enumerate(counts):
            mine = torch.rand(c, c).tril(-1) > 0.5
            links[q_start[r] : q_start[r + 1], :c] = mine | torch.eye(c, dtype=torch.bool)
            positions[q_start[r] : q_start[r + 1]] -= torch.arange(c) // 2
    to = lambda x: None if x is None else x.to(device)  # noqa: E731
    max_q, max_kv = max_q or max(counts), max(lengths) + (5000 if spread else 0)
    work = attention.plan(
        to(q_start),
        to(kv_len),
        max_q,
        max_kv,
        tokens,
        heads // kv_heads,
        rules.window,
        4 * heads * (v_dim + 1),
        dtype == torch.float32,
    )
    out = attention.attend(to(q), cache, work, to(table), rules, to(sink), to(links), to(positions)).cpu()
    if fp8:
        k, v = [kept(x) for x in k], [kept(x) for x in v]
    for r, (n, c) in enumerate(zip(lengths, counts)):
        span = slice(int(q_start[r]), int(q_start[r + 1]))
        own = torch.arange(n - c, n)
        position = own if positions is None else positions[span]
        mine = None if links is None else links[span, :c]
        want = formula(q[span], k[r], v[r], own, position, rules, sink, mine)
        error = (out[span].double() - want).norm() / (want.norm() + 1e-9) if c else 0.0
        limit = max(TOLERANCE[dtype], 1e-2 if fp8 else 0)
        assert not error > limit, f"row {r} ({n} tokens, {c} queries): {error}"
        assert out[span].isfinite().all()
    return out


def test_decode_of_long_and_short_rows(device):
    run(device, [400, 1, 16, 17, 140], [1, 1, 1, 1, 1])


def test_rows_without_queries_and_padded_bounds(device):
    run(device, [40, 33, 20], [1, 0, 2], max_q=4, spread=True)


def test_decode_in_half_precision(device):
    run(device, [150, 40], [1, 1], dtype=torch.float16, heads=6, kv_heads=2, dim=24)


def test_verification_rows(device):
    run(device, [150, 40, 5], [5, 3, 5], heads=4, kv_heads=1)


def test_prefill_and_decode_in_one_step(device):
    run(device, [90, 60, 150, 1], [90, 40, 1, 1])


def test_prefill_in_half_precision(device):
    run(device, [90], [70], dtype=torch.float16, dim=32)


@pytest.mark.parametrize("counts", [[1, 3], [40, 1]])
def test_window(device, counts):
    run(device, [203, 70], counts, rules=Rules(0.3, window=37))


@pytest.mark.parametrize("window", [pytest.param(None, marks=slow), 20])
def test_not_causal(device, window):
    run(device, [60, 40], [60, 2], rules=Rules(0.3, window=window, causal=False))


@pytest.mark.parametrize("counts", [[1, 1], pytest.param([50, 1], marks=slow)])
def test_soft_cap_and_sinks(device, counts):
    run(device, [290, 50], counts, rules=Rules(0.5, soft_cap=2.0), sinks=True)


@pytest.mark.parametrize("counts", [[1, 1], [45, 4]])
def test_first_slot(device, counts):
    run(device, [45, 20], counts, rules=Rules(0.3, first_slot=1))


@pytest.mark.parametrize("window", [pytest.param(None, marks=slow), 12])
def test_trees(device, window):
    run(device, [280, 30], [6, 4], tree=True, rules=Rules(0.3, window=window))


@pytest.mark.parametrize("counts", [pytest.param([1, 1], marks=slow), [40, 1]])
def test_values_of_another_size(device, counts):
    run(device, [90, 45], counts, dim=48, v_dim=24)


@pytest.mark.parametrize("counts", [[1, 1], pytest.param([40, 1], marks=slow)])
def test_e4m3_cache(device, counts):
    run(device, [280, 45], counts, fp8=True, rules=Rules(0.25, soft_cap=3.0 if counts[0] == 1 else None))


def test_a_row_does_not_depend_on_the_others(device):
    """The same row first, then among others, longer bounds and a prefill."""
    alone = run(device, [150], [1])
    assert torch.equal(run(device, [150, 20], [1, 1], max_q=2, spread=True)[:1], alone)
    assert torch.equal(run(device, [150, 40], [1, 40])[:1], alone)


@pytest.mark.parametrize("fp8", [False, True])
def test_write(device, fp8):
    """Strided k and v; -1 is not written, nor is any other slot."""
    torch.manual_seed(0)
    qkv = torch.randn(5, 9, 40, device=device)
    k, v = qkv[:, 2:5, :24], qkv[:, 5:8]
    slots = torch.tensor([17, -1, 3, 47, 16], device=device)
    dtype = torch.uint8 if fp8 else torch.float32
    made = [
        Cache(*(torch.full((3, 3, BLOCK, d), 7, dtype=dtype, device=device) for d in (24, 40)),
              torch.full((3, 3, BLOCK, 2), 7.0, device=device) if fp8 else None)
        for _ in range(2)
    ]  # fmt: skip
    attention.write(made[0], k, v, slots)
    store(made[1], k.cpu(), v.cpu(), slots.cpu())
    for ours, wanted in ((made[0].k, made[1].k), (made[0].v, made[1].v)):
        assert ((ours.int() - wanted.int()).abs() <= 1).all() if fp8 else torch.equal(ours, wanted)
        assert (ours != wanted).float().mean() < 1e-3
    if fp8:
        torch.testing.assert_close(made[0].scales, made[1].scales)


def rms(x, w, offset):
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    return y * (w + offset)


@pytest.mark.parametrize(
    ("norm", "offset", "interleaved", "fp8"), [(False, 0, False, False), (True, 0, True, False), (True, 1, False, True)]
)
def test_norm_rotation_and_write_in_one(device, norm, offset, interleaved, fp8):
    torch.manual_seed(0)
    qkv = torch.randn(4, 10 + 3 + 3, 24, device=device)
    q, k, v = qkv[:, :10], qkv[:, 10:13], qkv[:, 13:]
    angles = torch.rand(30, 10, device=device) * 6
    at, slots = torch.tensor([3, 29, 0, 7], device=device), torch.tensor([17, -1, 3, 47], device=device)
    c, s = angles.cos()[at][:, None], angles.sin()[at][:, None]
    weights = [torch.randn(24, device=device) for _ in range(2)] if norm else [None, None]

    def turned(x, w):
        x = rms(x, w, offset) if norm else x
        a, b = x[..., :20].unflatten(-1, (10, 2) if interleaved else (2, 10)).unbind(-1 if interleaved else -2)
        pairs = torch.stack([a * c - b * s, b * c + a * s], -1 if interleaved else -2).flatten(-2)
        return torch.cat([pairs, x[..., 20:]], -1)

    want_q, want_k = turned(q.clone(), weights[0]), turned(k.clone(), weights[1])
    dtype = torch.uint8 if fp8 else torch.float32
    made = [
        Cache(*(torch.full((3, 3, BLOCK, 24), 7, dtype=dtype, device=device) for _ in range(2)),
              torch.full((3, 3, BLOCK, 2), 7.0, device=device) if fp8 else None)
        for _ in range(2)
    ]  # fmt: skip
    store(made[1], want_k.cpu(), v.cpu(), slots.cpu())
    attention.prepare(q, k, v, made[0], slots, angles.cos(), angles.sin(), at, interleaved, *weights, 1e-6, offset)
    torch.testing.assert_close(q, want_q)
    for ours, wanted in ((made[0].k, made[1].k), (made[0].v, made[1].v)):
        if fp8:
            assert ((ours.int() - wanted.int()).abs() <= 1).all() and (ours != wanted).float().mean() < 1e-3
        else:
            torch.testing.assert_close(ours, wanted)
    if fp8:
        torch.testing.assert_close(made[0].scales, made[1].scales)


def test_tokens_are_copied_as_if_read_before_any_write(device):
    cache = Cache(*(torch.randn(3, 2, BLOCK, d).to(device) for d in (16, 24)))
    k, v = (x.transpose(1, 2).flatten(0, 1).clone() for x in (cache.k, cache.v))
    src, dst = torch.tensor([3, 20, 0, 4]), torch.tensor([4, 3, 0, 40])
    attention.copy_tokens(cache, src.to(device), dst.to(device))
    for before, now in ((k, cache.k), (v, cache.v)):
        before[dst.to(device)] = before[src.to(device)]
        assert torch.equal(before, now.transpose(1, 2).flatten(0, 1))


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 192, 256])
def test_head_sizes_on_a_gpu(device, dtype, dim):
    run(device, [1000, 4100, 1], [1, 1, 1], dtype=dtype, heads=8, kv_heads=2, dim=dim)
    run(device, [700, 300, 64], [700, 40, 1], dtype=dtype, heads=8, kv_heads=2, dim=dim)


@gpu
@pytest.mark.parametrize("group", [1, 7, 16])
def test_groups_on_a_gpu(device, group):
    run(device, [1000, 20], [1, 1], dtype=torch.bfloat16, heads=2 * group, kv_heads=2, dim=128)
    run(device, [500, 20], [300, 1], dtype=torch.bfloat16, heads=2 * group, kv_heads=2, dim=128)
    run(device, [500, 20], [300, 1], dtype=torch.bfloat16, heads=2 * group, kv_heads=2, dim=128, fp8=True)
