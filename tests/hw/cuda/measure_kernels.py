"""Each kernel against its floor: bytes over the bandwidth of a large copy, or operations over the rate of a large product,
both measured in the same run.

    PYTHONPATH=hw/cuda python tests/hw/cuda/measure_kernels.py [--only PARTS] [--json FILE]

Needs a GPU, torch and triton. Times are medians of replayed CUDA graphs; inputs rotate so that no weight
or cache is read from L2.
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from kernel_cuda import grouped
from kernel_cuda.attention import CudaAttention
from kernel_cuda.kernels import attention, linear, moe, pointwise, sampling
from kernel_cuda.split import HostRows, known

from kernel_core.nn.api import AttentionBatch, AttentionSpec

L2 = 256 << 20  # inputs of one launch and the next are this many bytes apart
MODELS = {"0.5B": (896, 4864, 14, 2, 64, 151936), "1B": (2048, 8192, 32, 8, 64, 128256), "8B": (4096, 14336, 32, 8, 128, 128256)}
HALF = torch.bfloat16
ROWS = []


def timed(launches, repeat=7):
    """Seconds of one launch: the calls one after the other in a graph, replayed."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    inner = max(1, math.ceil(8 / len(launches)))
    with torch.cuda.graph(graph):
        for _ in range(inner):
            for launch in launches:
                launch()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / inner / len(launches))
    return statistics.median(times[1:])


def copies(nbytes):
    return max(1, min(64, math.ceil(L2 / nbytes)))


def alone(launch, repeat=7):
    """Seconds of a launch outside a graph."""
    launch()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def floors():
    a = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    bandwidth = 2 * a.numel() / alone(lambda a=a, b=b: b.copy_(a))
    del a, b
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=HALF) for _ in range(2))
    return bandwidth, 2 * 8192**3 / alone(lambda: x @ y)


def report(name, seconds, nbytes, operations=0, other=None):
    floor = max(nbytes / BANDWIDTH, operations / RATE)
    row = {"kernel": name, "us": seconds * 1e6, "floor_us": floor * 1e6, "of_floor": floor / seconds}
    if other:
        row["torch_us"] = other * 1e6
    ROWS.append(row)
    beside = f"   torch {other * 1e6:9.1f} us" if other else ""
    print(f"{name:44} {seconds * 1e6:9.1f} us {100 * floor / seconds:5.0f} %{beside}", flush=True)


def weights(n, k):
    return [torch.randn(n, k, device="cuda", dtype=HALF) * 0.05 for _ in range(copies(2 * n * k))]


def layer_shapes(model):
    hidden, inner, heads, kv_heads, dim, vocab = MODELS[model]
    return {
        "qkv": ((heads + 2 * kv_heads) * dim, hidden), "out": (hidden, heads * dim), "gate_up": (2 * inner, hidden),
        "down": (hidden, inner), "head": (vocab, hidden),
    }  # fmt: skip


def linears():
    for model in MODELS:
        for name, (n, k) in layer_shapes(model).items():
            ws = weights(n, k)
            for m in (1, 8, 16, 32, 64) if model == "8B" else (1, 16, 64):
                x = torch.randn(m, k, device="cuda", dtype=HALF)
                ours = timed([lambda w=w: linear.few_rows(x, w) for w in ws])
                theirs = timed([lambda w=w: F.linear(x, w) for w in ws])
                report(f"linear {model} {name} M={m}", ours, 2 * (n * k + m * k + m * n), 2 * m * n * k, theirs)
                if name == "gate_up":
                    ours = timed([lambda w=w: linear.few_rows(x, w, gate=0) for w in ws])
                    report(f"linear+silu_mul {model} M={m}", ours, 2 * (n * k + m * k + m * n // 2), 2 * m * n * k)
            del ws


def narrow():
    n, k = 28672, 4096
    for m in (1, 16, 64):
        x = torch.randn(m, k, device="cuda", dtype=HALF)
        scale = torch.rand(n, device="cuda")
        q = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda") for _ in range(3)]
        report(f"int8 gate_up M={m}", timed([lambda w=w: linear.few_rows(x, w, None, scale) for w in q]), n * k)
        q = [w.view(torch.uint8) & 0xF7 for w in q]
        report(f"e4m3 gate_up M={m}", timed([lambda w=w: linear.few_rows(x, w, None, scale) for w in q]), n * k)
        scale = torch.rand(n, k // 128, device="cuda")
        q = [torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device="cuda") for _ in range(5)]
        report(f"int4 gate_up M={m}", timed([lambda w=w: linear.few_rows_int4(x, w, scale) for w in q]), n * k * 9 // 16)


def shortest(label, candidates, launches, nbytes, operations=0):
    """Time a launch with each shape; the four best are reported. launches(shape) → calls, or raises."""
    found = []
    for shape in candidates:
        try:
            found.append((timed(launches(shape), 4), shape))
        except Exception as error:
            print("tune", label, shape, type(error).__name__, str(error)[:80])
    for seconds, shape in sorted(found, key=lambda pair: pair[0])[:4]:
        report(f"tune {label} {shape}", seconds, nbytes, operations)


def tune_linears():
    n, k = 28672, 4096
    ws = weights(n, k)
    for m in (1, 16, 64):
        x = torch.randn(m, k, device="cuda", dtype=HALF)
        launches = lambda shape: [lambda w=w: linear.few_rows(x, w, gate=0, shape=linear.Shape(*shape)) for w in ws]  # noqa: E731
        shortest(f"gate_up+silu M={m}", GATED, launches, 2 * n * k)
    q = [torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda") for _ in range(3)]
    scale = torch.rand(n, device="cuda")
    for m in (1, 64):
        x = torch.randn(m, k, device="cuda", dtype=HALF)
        launches = lambda shape: [lambda w=w: linear.few_rows(x, w, None, scale, shape=linear.Shape(*shape)) for w in q]  # noqa: E731
        shortest(f"int8 M={m}", BYTES, launches, n * k)


def tune_attention():
    short, long, rows = attention.short_shape, attention.long_shape, attention.tile_rows
    for shape in TILES:
        attention.tile_rows = lambda group, wide, bm=shape[0]: bm
        attention.long_shape = lambda *_, s=shape: dict(zip(("BM", "BN", "num_warps", "num_stages"), s))
        print("tune prefill", shape, end=" ")
        try:
            prefill("8B", 4, 4096, beside=False)
        except Exception as error:
            print(type(error).__name__, str(error)[:80])
    attention.tile_rows, attention.long_shape = rows, long
    for shape in CHUNKS:
        attention.short_shape = lambda *_, s=shape: {"BM": 16, **dict(zip(("BN", "num_warps", "num_stages"), s))}
        print("tune decode", shape)
        for batch, context, fp8 in ((1, 512, False), (64, 512, False), (64, 8192, False), (64, 8192, True)):
            decode("8B", batch, context, fp8)
    attention.short_shape = short


GATED = [(32, 128, 4, 4), (32, 128, 4, 6), (32, 64, 4, 8), (64, 64, 4, 4), (64, 64, 8, 4), (16, 256, 4, 4)]
BYTES = [(64, 256, 4, 4), (64, 128, 4, 4), (32, 256, 4, 4), (64, 128, 4, 6), (128, 128, 8, 4)]
TILES = [(128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3)]
CHUNKS = [(32, 4, 4), (32, 4, 5), (32, 2, 4), (64, 2, 3), (32, 1, 4)]


def cache_of(batch, context, heads, dim, fp8=False):
    blocks = batch * context // 16 + 1
    kept = torch.uint8 if fp8 else HALF
    parts = [torch.empty(blocks, heads, 16, dim, dtype=kept, device="cuda") for _ in range(2)]
    for part in parts:
        part.random_(0, 100) if fp8 else part.normal_()
    scales = torch.full((blocks, heads, 16, 2), 0.01, device="cuda") if fp8 else None
    table = (torch.randperm(blocks - 1, device="cuda").int() + 1).view(batch, -1)
    return attention.Cache(*parts, scales), table


def decode(model, batch, context, fp8=False, queries=1):
    _, _, heads, kv_heads, dim, _ = MODELS[model]
    nbytes = batch * context * kv_heads * ((2 * dim + 8) if fp8 else 4 * dim)
    sets = [cache_of(batch, context, kv_heads, dim, fp8) for _ in range(min(16, copies(nbytes)))]
    q = torch.randn(batch * queries, heads, dim, device="cuda", dtype=HALF)
    q_start = torch.arange(0, batch * queries + 1, queries, device="cuda", dtype=torch.int32)
    kv_len = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    group, row_bytes = heads // kv_heads, 4 * heads * (dim + 1)
    plan = lambda: attention.plan(q_start, kv_len, queries, context, batch * queries, group, None, row_bytes)  # noqa: E731
    work, rules = plan(), attention.Rules(dim**-0.5)
    seconds = timed([lambda c=c, t=t: attention.attend(q, c, work, t, rules) for c, t in sets])
    report(
        f"decode {model} B={batch} ctx={context}{' e4m3' if fp8 else ''}{f' q={queries}' if queries > 1 else ''}", seconds, nbytes
    )
    if batch == 256 and context == 8192:
        report("attention plan B=256", timed([plan]), 4096)


def prefill(model, rows, length, beside=True):
    _, _, heads, kv_heads, dim, _ = MODELS[model]
    cache, table = cache_of(rows, length, kv_heads, dim)
    q = torch.randn(rows * length, heads, dim, device="cuda", dtype=HALF)
    q_start = torch.arange(0, rows * length + 1, length, device="cuda", dtype=torch.int32)
    kv_len = torch.full((rows,), length, device="cuda", dtype=torch.int32)
    work = attention.plan(q_start, kv_len, length, length, rows * length, heads // kv_heads, None, 4 * heads * (dim + 1))
    rules = attention.Rules(dim**-0.5)
    seconds = timed([lambda: attention.attend(q, cache, work, table, rules)], 4)
    if not beside:
        report(f"prefill {model} {rows} x {length}", seconds, 0, 2 * rows * heads * length * length * dim)
        return
    k, v = (torch.randn(rows, heads, length, dim, device="cuda", dtype=HALF) for _ in range(2))
    qs = q.view(rows, length, heads, dim).transpose(1, 2).contiguous()
    other = timed([lambda: F.scaled_dot_product_attention(qs, k, v, is_causal=True)], 4)
    report(f"prefill {model} {rows} x {length}", seconds, 0, 2 * rows * heads * length * length * dim, other)
    ks = torch.randn(rows * length, kv_heads, dim, device="cuda", dtype=HALF)
    slots = torch.arange(16, 16 + rows * length, device="cuda")
    report(f"kv write {rows * length}", timed([lambda: attention.write(cache, ks, ks, slots)]), 8 * ks.numel())


def mixed(model, chunk, before, decoding=8, context=4096):
    """A step of `decoding` rows and a chunk of a prompt through the backend: as the rule has it, and by our kernels alone."""
    _, _, heads, kv_heads, dim, _ = MODELS[model]
    counts, lengths = np.array([1] * decoding + [chunk]), np.array([context] * decoding + [before + chunk])
    width, layers = -(-lengths.max() // 16), 4
    table = torch.arange(1, len(counts) * width + 1, device="cuda", dtype=torch.int32).view(len(counts), width)
    starts = torch.tensor([0, *np.cumsum(counts)], device="cuda", dtype=torch.int32)
    own = torch.cat([torch.arange(n - c, n) for c, n in zip(counts, lengths)]).cuda()
    row = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).cuda()
    slots = table[row, own // 16].long() * 16 + own % 16
    kv_len = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    plain = AttentionBatch(starts, kv_len, table, slots, 16, chunk, int(lengths.max()))
    batch = known(plain, HostRows(counts, lengths))
    spec = AttentionSpec("layer", heads, kv_heads, dim, dim, dim**-0.5)
    backend = CudaAttention(torch.device("cuda"), HALF)
    caches = [backend.allocate(spec, HALF, 16, table.numel() + 1) for _ in range(layers)]
    q, k, v = (torch.randn(len(row), h, dim, device="cuda", dtype=HALF) for h in (heads, kv_heads, kv_heads))
    launches = lambda plan: [lambda c=c: backend.forward(q, k, v, c, plan, spec, None) for c in caches]  # noqa: E731
    parted, ours = (timed(launches(backend.plan(b, [spec])), 4) for b in (batch, plain))
    operations = 4 * heads * dim * (chunk * before + chunk * chunk // 2)
    name = f"mixed {model} {decoding} x {context} + {chunk} at {before}"
    split_plan = lambda: backend._parted(batch, spec)  # noqa: E731
    taken = split_plan()
    report(f"{name}: {'flash' if taken else 'ours'}", parted, decoding * context * kv_heads * 4 * dim, operations)
    report(f"{name}: ours", ours, decoding * context * kv_heads * 4 * dim, operations)
    if taken:
        call = taken.split.calls[0]
        seconds = timed([lambda c=c: attention.gather(c, call.slots) for c in caches])
        report(f"{name}: gathering", seconds, 8 * len(call.slots) * kv_heads * dim)
        report(f"{name}: splitting, once a step", alone(split_plan), 4096)


def mixes():
    for model in ("8B", "1B", "0.5B"):
        for before in (0, 4096):
            mixed(model, 2048, before)
    for chunk in (64, 128, 256, 512):  # about where gathering begins to pay
        mixed("8B", chunk, 4096)


def points():
    for m in (1, 64, 8192):
        x, r, w = (torch.randn(*s, device="cuda", dtype=HALF) for s in ((m, 4096), (m, 4096), (4096,)))
        report(f"rms_norm+residual {m}x4096", timed([lambda: pointwise.rms_norm(x, w, 1e-5, r)]), 8 * m * 4096)
        g = torch.randn(m, 28672, device="cuda", dtype=HALF)
        report(f"silu_mul {m}x14336", timed([lambda: pointwise.act_mul(g, 0)]), 3 * g.numel())
        qkv, at = torch.randn(m, 48, 128, device="cuda", dtype=HALF), torch.arange(m, device="cuda")
        cos = torch.rand(8192, 64, device="cuda")
        report(f"rotary {m}", timed([lambda: pointwise.rotary(qkv[:, :32], qkv[:, 32:40], cos, cos, at)]), 4 * m * 40 * 128)
        table = torch.randn(128256, 4096, device="cuda", dtype=HALF)
        report(f"embedding {m}", timed([lambda: pointwise.embedding(at, table)]), 4 * m * 4096)


def samples():
    for m in (1, 64, 256):
        logits = torch.randn(m, 128256, device="cuda", dtype=HALF) * 2.5
        key, at = torch.randint(0, 1 << 30, (m, 2), dtype=torch.int32, device="cuda"), torch.arange(m, device="cuda")
        one, zero = torch.ones(m, device="cuda"), torch.zeros(m, device="cuda")
        off = torch.zeros(m, dtype=torch.int32, device="cuda")
        report(f"argmax {m}", timed([lambda: sampling.argmax(logits)]), logits.nbytes, other=timed([lambda: logits.argmax(-1)]))
        for name, k, p in (
            ("plain", off, one),
            ("top_k 50", off + 50, one),
            ("top_p 0.9", off, 0.9 * one),
            ("both", off + 50, 0.9 * one),
        ):
            launch = lambda k=k, p=p: sampling.sample(logits, at, at, one, zero, k, p, key)  # noqa: E731
            other = timed([lambda: logits.float().sort(-1)], 3) if name == "top_p 0.9" else None
            report(f"sample {name} {m}", timed([launch], 4), logits.nbytes, other=other)


def experts():
    hidden, inner, count, top = 4096, 14336, 8, 2
    up, down = weights(count * 2 * inner, hidden)[0], weights(count * hidden, inner)[0]
    up, down = up.view(count, 2 * inner, hidden), down.view(count, hidden, inner)
    for m in (1, 16, 64, 256, 2048):
        x, logits = torch.randn(m, hidden, device="cuda", dtype=HALF), torch.randn(m, count, device="cuda")
        chosen, numbers = moe.route(logits, top, True)
        used, given = len(numbers.unique()), (x, up, down, chosen, numbers, 0)
        seconds = timed([lambda: moe.experts_mlp(*given)])
        other = timed([lambda: moe.experts_mlp_by(grouped.multiply, *given)]) if grouped.works(x.device, HALF) else None
        report(f"experts 8x(4096, 14336) M={m}", seconds, 6 * used * inner * hidden, 6 * m * top * inner * hidden, other=other)


def decodes():
    for batch, context in ((1, 512), (1, 8192), (8, 8192), (64, 512), (64, 8192), (256, 512), (256, 8192)):
        decode("8B", batch, context)
    decode("8B", 64, 8192, fp8=True)
    decode("8B", 8, 8192, queries=5)
    for model, batch in (("1B", 1), ("1B", 64), ("0.5B", 64)):
        decode(model, batch, 8192)


PARTS = {
    "decode": decodes,
    "mixed": mixes,
    "prefill": lambda: [prefill(model, 4, 4096) for model in ("8B", "1B")],
    "linears": linears, "narrow": narrow, "points": points, "samples": samples, "experts": experts,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", default="", help="parts, comma-separated: " + ", ".join([*PARTS, "tune_linears", "tune_attention"])
    )
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    BANDWIDTH, RATE = floors()
    print(f"{torch.cuda.get_device_name()}: copy {BANDWIDTH / 1e12:.2f} TB/s, product {RATE / 1e12:.0f} TFLOP/s", flush=True)
    for part in arguments.only.split(",") if arguments.only else PARTS:
        try:
            {**PARTS, "tune_linears": tune_linears, "tune_attention": tune_attention}[part]()
        except Exception as error:
            print(f"{part} failed: {error!r}"[:600], flush=True)
        torch.cuda.empty_cache()
        if arguments.json:
            found = {"device": torch.cuda.get_device_name(), "bandwidth": BANDWIDTH, "rate": RATE, "rows": ROWS}
            written = Path(arguments.json + ".part")
            written.write_text(json.dumps(found, indent=1))
            written.replace(arguments.json)
