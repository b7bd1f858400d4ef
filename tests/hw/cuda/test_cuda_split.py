"""Steps of which torch's flash attention takes some rows: the same answers as the reference, whatever the rows.

The splitting is the real one; in the place of flash, and for most cases of our kernels, stand formulas that are as strict as they
are: what is not theirs they fill with NaN, and what they are told of sizes must hold.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from graph_emulator import WAITS
from kernel_cuda import flash
from kernel_cuda.attention import CudaAttention
from kernel_cuda.kernels import attention
from kernel_cuda.split import RULE, HostRows, KnownInputs, Rule, known, seen_keys, seen_pairs, split

from kernel_core import Engine, SamplingParams
from kernel_core.nn.api import AttentionBatch, AttentionSpec, StepInputBuilder
from kernel_core.nn.reference_attention import ReferenceAttention

CPU = torch.device("cpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BLOCK = 4
EVEN = ((256, 1.0),)
MANY = Rule(
    per_byte=3.0, launches=300.0, most_bytes=6_000, gains=EVEN
)  # rows of some ten queries pay, and long steps need several calls


def bottom_right(q, k, v, q_start, k_start, max_q, max_k, scale, window):
    """What `flash.attend` promises, checking what it is told."""
    out = torch.full_like(q, torch.nan)
    assert q_start.dtype == k_start.dtype == torch.int32 and len(q_start) == len(k_start)
    assert q_start[0] == k_start[0] == 0 and q_start[-1] == len(q) and k_start[-1] <= len(k)
    for (begin, end), (first, last) in zip(pairwise(q_start.tolist()), pairwise(k_start.tolist())):
        if first == last:
            continue
        assert end - begin <= max_q and last - first <= max_k and end - begin <= last - first
        at = torch.arange(last - first)
        ago = at[last - first - (end - begin) :, None] - at
        seen = (ago >= 0) & (ago < (window or len(at)))
        keys, values = (x[first:last].double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q[begin:end].double(), keys) * scale
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hnm,mhd->nhd", weights, values).to(q.dtype)
    return out


class Formulas:
    """In the place of `kernels.attention`: rows of length 0 stay as they are."""

    Cache, Rules = attention.Cache, attention.Rules

    @staticmethod
    def write(cache, k, v, slots):
        for part, x in ((cache.k, k), (cache.v, v)):
            part[slots[slots >= 0] // BLOCK, :, slots[slots >= 0] % BLOCK] = x[slots >= 0]

    @staticmethod
    def gather(cache, slots):
        kept = (slots >= 0)[:, None, None]
        return [torch.where(kept, part[slots // BLOCK, :, slots % BLOCK], torch.nan) for part in (cache.k, cache.v)]

    @staticmethod
    def plan(q_start, kv_len, max_q, max_kv, tokens, group, window, row_bytes, wide):
        q = q_start.diff()[kv_len > 0]
        assert q.numel() and q.max() <= max_q and q.sum() <= tokens and kv_len.max() <= max_kv
        return q_start, kv_len

    @staticmethod
    def attend(q, cache, work, table, rules, sinks, tree, positions, out):
        out = torch.full_like(q, torch.nan) if out is None else out
        for row, ((begin, end), length) in enumerate(zip(pairwise(work[0].tolist()), work[1].tolist())):
            if length and end > begin:
                at = torch.arange(length)
                k, v = (part[table[row, at // BLOCK].long(), :, at % BLOCK] for part in (cache.k, cache.v))
                starts = [torch.tensor([0, n], dtype=torch.int32) for n in (end - begin, length)]
                out[begin:end] = bottom_right(q[begin:end], k, v, *starts, length, length, rules.scale, rules.window)
        return out


def step(counts, lengths, bounds=None, window=None, heads=(4, 2), dim=8, device=CPU, dtype=torch.float32, block=BLOCK, padding=0,
         hit=False):  # fmt: skip
    """A random step of rows of `counts` queries and `lengths` tokens of KV → batch, layer, q, k, v and the filled cache, where
    all else is NaN. The last `padding` rows are nobody's: they read the null block and write nothing. `hit`: nor do the first
    tokens of the others, whose KV is there."""
    draw = torch.Generator().manual_seed(sum(counts) * 1000 + sum(lengths))
    width, mine = -(-max(lengths) // block), len(counts) - padding
    table = (torch.randperm(len(counts) * width, generator=draw) + 1).view(len(counts), width)
    table[mine:] = 0
    own = torch.cat([torch.arange(n - c, n) for c, n in zip(counts, lengths)])
    row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    slots = table[row, own // block] * block + own % block
    spec = AttentionSpec("layer", *heads, dim, dim, 0.3, "full" if window is None else "window", window)
    q = torch.randn(len(row), heads[0], dim, generator=draw).to(dtype)
    k, v = (torch.randn(len(row), heads[1], dim, generator=draw).to(dtype) for _ in range(2))
    kept = [torch.full((table.numel() + 1, heads[1], block, dim), torch.nan).to(dtype) for _ in range(2)]
    there = [n - c + (hit and min(c, 2)) for c, n in zip(counts, lengths)]
    for part in kept:
        part[0] = 0
        for r, n in enumerate(there):
            at = torch.arange(n)
            part[table[r, at // block], :, at % block] = torch.randn(n, heads[1], dim, generator=draw).to(dtype)
    slots[(own < torch.tensor(there)[row]) | (row >= mine)] = -1
    for r, n in enumerate(lengths):
        table[r, -(-n // block) :] = 1 << 30  # beyond a row's length: must not be read
    starts = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    bounds = lengths if bounds is None else bounds
    batch = AttentionBatch(
        starts.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), table.int().to(device), slots.to(device),
        block, max(counts), max(bounds),
    )  # fmt: skip
    batch = known(batch, HostRows(np.array(counts), np.array(bounds)))
    return batch, spec, [x.to(device) for x in (q, k, v)], [part.to(device) for part in kept]


def wanted(batch, spec, qkv, kept):
    """The reference's answer, which knows of no rows without queries."""
    reference, some = ReferenceAttention(kept[0].device), batch.q_start.diff() > 0
    starts = torch.cat([batch.q_start[:1], batch.q_start[1:][some]])
    sizes = batch.block_size, batch.max_q, batch.max_kv
    plain = AttentionBatch(starts, batch.kv_len[some], batch.block_table[some], batch.slot_mapping, *sizes)
    flat = tuple(part.transpose(1, 2).flatten(0, 1).clone() for part in kept)
    return reference.forward(*qkv, flat, reference.plan(plain, [spec]), spec, None)


def given_by(backend, batch, spec, qkv, kept):
    cache = attention.Cache(*(part.clone() for part in kept))
    return backend.forward(*qkv, cache, backend.plan(batch, [spec]), spec, None)


rows_of_a_step = st.lists(
    st.tuples(st.sampled_from([0, 1, 1, 1, 2, 5, 9, 14, 23]), st.integers(0, 40), st.integers(0, 6)), min_size=1, max_size=7
).filter(lambda rows: any(count for count, _, _ in rows))


@pytest.fixture(scope="module", autouse=True)
def formulas():
    """Our kernels as formulas, for the tests of this module that do not ask for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernel_cuda.attention.attention", Formulas)
        yield


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=rows_of_a_step, padding=st.integers(0, 2), hit=st.booleans(), window=st.sampled_from([None, None, 3, 12]),
    heads=st.sampled_from([(4, 2), (3, 3), (8, 1)]),
)  # fmt: skip
def test_random_steps(rows, padding, hit, window, heads):
    """Rows without queries, of one or many tokens, with and without KV before them, longer for the host than they are."""
    rows = rows + [(1, 0, 0)] * padding
    counts = [count for count, _, _ in rows]
    lengths = [max(1, count + before) for count, before, _ in rows]
    bounds = [n + over for n, (_, _, over) in zip(lengths, rows)]
    batch, spec, qkv, kept = step(counts, lengths, bounds, window, heads, padding=padding, hit=hit)
    backend = CudaAttention(CPU, attend=bottom_right, rule=MANY)
    torch.testing.assert_close(given_by(backend, batch, spec, qkv, kept), wanted(batch, spec, qkv, kept), atol=1e-5, rtol=1e-5)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=rows_of_a_step, window=st.sampled_from([None, 12]))
def test_a_row_goes_the_same_way_in_every_step(rows, window):
    spec = AttentionSpec("layer", 4, 2, 8, 8, 0.3, "full" if window is None else "window", window)
    q, kv = (np.array(x) for x in zip(*((count, count + before) for count, before, _ in rows)))
    together = MANY.takes(HostRows(q, kv), spec)
    alone = [MANY.takes(HostRows(q[i : i + 1], kv[i : i + 1]), spec)[0] for i in range(len(q))]
    assert together.tolist() == alone


def test_the_cases_are_what_they_should_be():
    """One call, several calls, none, and nothing left for our kernels do occur with these sizes."""

    def parts(counts, lengths):
        batch, spec, *_ = step(counts, lengths)
        return split(batch, spec, MANY)

    assert parts([1, 1, 2], [20, 30, 2]) is None
    both = parts([1, 23, 1], [30, 30, 9])
    assert len(both.calls) == 1 and both.tokens == 2 and both.max_q == 1 and both.kv_len.tolist() == [30, 0, 9]
    assert both.calls[0].q_start.tolist() == [0, 1, 24, 25] and both.calls[0].k_start.tolist() == [0, 0, 30, 30]
    several = parts([1, 23, 23, 1, 23], [1, 60, 30, 5, 60])
    assert [(call.begin, call.end, len(call.slots)) for call in several.calls] == [(0, 47, 90), (47, 71, 60)]
    assert parts([23, 23], [60, 60]).tokens == 0


def test_what_the_host_does_not_know_goes_the_old_way():
    batch, spec, qkv, kept = step([1, 23], [30, 40])
    refuse = lambda *args: pytest.fail("flash was asked")  # noqa: E731
    plain = AttentionBatch(**{name: getattr(batch, name) for name in AttentionBatch.__dataclass_fields__})
    backend = CudaAttention(CPU, attend=refuse, rule=MANY)
    for other, layer in (
        (plain, spec),
        (replace(batch, tree=torch.ones(24, 23, dtype=torch.bool).tril()), spec),
        (batch, replace(spec, soft_cap=3.0)),
        (batch, replace(spec, first_slot=1)),
        (batch, replace(spec, causal=False)),
        (batch, replace(spec, v_head_dim=16)),
    ):
        assert backend._flash_does(layer, None) is (layer == spec)
        if layer == spec:
            torch.testing.assert_close(given_by(backend, other, spec, qkv, kept), wanted(batch, spec, qkv, kept))
    assert not backend._flash_does(spec, torch.zeros(4))
    assert split(batch, spec, MANY) and not split(batch, spec, replace(MANY, launches=1e12))


@pytest.mark.parametrize("window", [None, 5, 64])
def test_counts_of_keys_and_pairs(window):
    q, kv = np.array([1, 7, 20, 20, 0]), np.array([9, 7, 20, 50, 3])
    pairs, keys = [], []
    for count, length in zip(q.tolist(), kv.tolist()):
        seen = [{k for k in range(p + 1) if window is None or p - k < window} for p in range(length - count, length)]
        pairs.append(sum(map(len, seen)))
        keys.append(len(set().union(*seen)))
    rows = HostRows(q, kv)
    assert seen_pairs(rows, window).tolist() == pairs
    assert seen_keys(rows, window)[:4].tolist() == keys[:4]


def test_the_rule_at_the_sizes_of_real_models():
    """Decoding and verification never go to flash, chunks of prompts do, beyond what may be gathered they do not."""
    layer = AttentionSpec("8B", 32, 8, 128, 128, 0.1)
    q, kv = np.array([1, 6, 2048, 2048, 512, 64, 2048]), np.array([4096, 4096, 2048, 6144, 8192, 64, 100_000])
    assert RULE.takes(HostRows(q, kv), layer).tolist() == [False, False, True, True, True, False, False]
    short, narrow = HostRows(np.array([140, 160]), np.array([8192, 8192])), replace(layer, head_dim=64, v_head_dim=64)
    assert RULE.takes(short, layer).tolist() == [True, True]
    assert RULE.takes(short, narrow).tolist() == [False, False]  # flash gains less there


def test_the_runner_part_tells_what_the_plan_says(byte_model, monkeypatch):
    """A whole engine with the part: prompts in chunks beside decoding give the plain engine's tokens, and flash took rows."""

    def run():
        options = dict(device="cpu", dtype="float32", max_model_len=96, max_requests=4, max_tokens_per_step=24, block_size=16)
        with Engine(model=str(byte_model), **options) as engine:
            outputs, waiting = {}, [[7, 8, 9] * 20, [1, 2, 3], list(range(50))]
            while waiting or engine.has_unfinished_requests():
                if waiting:
                    asked = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
                    engine.add_request(str(len(waiting)), waiting.pop(0), asked)
                outputs.update((output.request_id, output.outputs[0].token_ids) for output in engine.step())
        return outputs

    calls = []

    def counted(*args):
        calls.append(len(args[3]))
        return bottom_right(*args)

    expected = run()
    monkeypatch.setattr(f"{__name__}.BLOCK", 16)
    backend = lambda: CudaAttention(CPU, torch.float32, attend=counted, rule=MANY)  # noqa: E731
    monkeypatch.setattr(
        "kernel_cpu.device.CpuDevice.runner_parts", lambda device: {"step_inputs": partial(KnownInputs, StepInputBuilder)}
    )
    monkeypatch.setattr("kernel_cpu.backend.PagedAttention", backend)
    monkeypatch.setattr("kernel_cpu.ops.register", lambda ops: None)
    monkeypatch.delattr(CudaAttention, "prepared_forward")
    assert run() == expected
    assert len(calls) > 3 and max(calls) > 3


def test_splitting_reads_nothing_from_the_device():
    class NoReads(TorchDispatchMode):
        @classmethod
        def _should_skip_dynamo(cls):
            return False  # which would import it

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func._schema.name not in WAITS - {"aten::lift_fresh"}  # an upload
            return func(*args, **(kwargs or {}))

    for window in (None, 12):
        batch, spec, *_ = step([1, 23, 5, 23, 1], [30, 60, 9, 60, 9], window=window)
        with NoReads():
            assert len(split(batch, spec, MANY).calls) == 2 - bool(window)


class TestKernels:
    """The same with our kernels, in the interpreter where there is no GPU."""

    @pytest.fixture(autouse=True)
    def kernels(self, monkeypatch):
        monkeypatch.setattr("kernel_cuda.attention.attention", attention)

    @pytest.mark.parametrize(
        ("counts", "lengths", "rule", "left"),
        [
            ([1, 40, 3, 0], [20, 60, 9, 1], MANY, 3),
            ([4, 9, 1], [60, 9, 5], Rule(0, 35_000, gains=EVEN), 9),  # fewer queries than a row that stays, for its KV is longer
            ([33, 20, 1], [33, 60, 5], Rule(0, 170_000, gains=EVEN), 33),  # so few that ours cut the other along its queries
        ],
        ids=["long", "short", "both long"],
    )
    def test_rows_of_flash_are_left_alone(self, device, counts, lengths, rule, left):
        batch, spec, qkv, kept = step(counts, lengths, [n + 20 for n in lengths], device=device, block=16)
        formula = lambda *args: bottom_right(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in args)).to(device)  # noqa: E731
        assert split(batch, spec, rule).max_q == left
        got = given_by(CudaAttention(device, torch.float32, attend=formula, rule=rule), batch, spec, qkv, kept)
        torch.testing.assert_close(got, wanted(batch, spec, qkv, kept), atol=2e-5, rtol=2e-5)

    def test_gathering(self, device):
        torch.manual_seed(0)
        cache = attention.Cache(*(torch.randn(3, 2, 16, d, device=device) for d in (24, 40)))
        slots = torch.tensor([*range(20, 40), 3, -1, -1], device=device)
        for part, got in zip((cache.k, cache.v), attention.gather(cache, slots)):
            flat = part.transpose(1, 2).flatten(0, 1)
            assert torch.equal(got[:-2], flat[slots[:-2]]) and not got[-2:].any()

    @gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_torch_has_what_is_promised_of_flash(self, device, dtype):
        assert flash.works(device, dtype, True) and flash.works(device, dtype, False)

    @gpu
    @pytest.mark.parametrize("dim", [16, 64, 80, 128, 192, 256])
    @pytest.mark.parametrize("window", [None, 1, 37, 5000])
    def test_flash_alone(self, device, dim, window):
        """Fewer queries than keys, queries without keys (which must not spoil others), a window longer than every row."""
        torch.manual_seed(0)
        q_start, k_start = ([0, 3, 203, 203, 350, 351], [0, 0, 900, 900, 1047, 1047])
        q, k, v = (torch.randn(n, h, dim).half() for n, h in ((351, 8), (1100, 2), (1100, 2)))
        starts = [torch.tensor(x, dtype=torch.int32) for x in (q_start, k_start)]
        expected = bottom_right(q, k, v, *starts, 200, 900, 0.1, window)
        got = flash.attend(*(x.to(device) for x in (q, k, v, *starts)), 200, 900, 0.1, window).cpu()
        for part in (slice(3, 203), slice(203, 350)):
            torch.testing.assert_close(got[part], expected[part], atol=4e-3, rtol=1e-2)

    @gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("heads", [(8, 2), (4, 4), (14, 2)])
    @pytest.mark.parametrize(("dim", "window"), [(64, None), (128, None), (128, 300), (256, None)])
    def test_steps_on_a_gpu(self, device, dtype, heads, dim, window):
        """By torch's flash, in one call and in several, as the reference and as our kernels alone; nothing waits."""
        counts, lengths = [1, 200, 5, 1, 130, 64], [500, 700, 33, 4100, 130, 900]
        parts = step(counts, lengths, [n + 3 for n in lengths], window, heads, dim, device, dtype, 16)
        expected = wanted(*parts).float()
        for most in (1 << 30, 1000 * 4 * heads[1] * dim, 0):
            backend = CudaAttention(device, dtype, rule=Rule(10, 0, most))
            given_by(backend, *parts)
            torch.cuda.set_sync_debug_mode("error")
            try:
                got = given_by(backend, *parts).float()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            assert (got - expected).norm() / expected.norm() < 1e-2
            assert (got - expected).abs().max() < 6e-2
