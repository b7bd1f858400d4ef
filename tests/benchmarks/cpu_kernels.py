"""Times the CPU kernels at the shapes of Qwen2.5-0.5B, against their floors and against torch in the same run.

    python tests/benchmarks/cpu_kernels.py [--threads N] [--repeat N]

Every figure is a median; candidates are measured in turn, so that a busy neighbour hits all of them. The floor of a memory-bound
kernel is a plain read of as many bytes by as many threads; that of a compute-bound one is torch's fp32 product.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import mmap
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

if importlib.util.find_spec("kernel_cpu") is None:
    sys.path.insert(0, str(Path(__file__).parents[2] / "hw" / "cpu"))

from kernel_cpu import attention, build, linear, pointwise, threads

LAYERS = 12  # matrices cycled through, so that none is found in the cache
BF16 = torch.bfloat16

READER = r"""
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>
typedef uint64_t block __attribute__((vector_size(64)));
extern "C" uint64_t read_all(const char *data, long bytes, int threads) {
    std::atomic<long> next{0};
    std::atomic<uint64_t> result{0};
    auto work = [&] {
        block a{}, b{}, c{}, d{};
        for (long begin; (begin = next.fetch_add(1 << 20)) < bytes;)
            for (long i = begin, end = begin + (1 << 20) < bytes ? begin + (1 << 20) : bytes; i + 256 <= end; i += 256) {
                for (int ahead = 0; ahead < 256; ahead += 64) __builtin_prefetch(data + i + 4096 + ahead);
                a ^= *(const block *)(data + i);
                b ^= *(const block *)(data + i + 64);
                c ^= *(const block *)(data + i + 128);
                d ^= *(const block *)(data + i + 192);
            }
        a ^= b ^ c ^ d;
        result += a[0];
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (auto &t : others) t.join();
    return result;
}
"""


def reader():
    """A function that reads so many bytes of memory with all threads and does nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "reader.cpp"), Path(folder, "reader.so")
        source.write_text(READER)
        subprocess.run(
            [
                build.find_compiler(),
                "-O3",
                "-march=native",
                "-Wno-psabi",
                "-shared",
                "-fPIC",
                "-pthread",
                str(source),
                "-o",
                str(library),
            ],
            check=True,
        )
        read_all = ctypes.CDLL(str(library)).read_all
    read_all.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
    pages = mmap.mmap(-1, 1 << 30)
    pages.madvise(mmap.MADV_HUGEPAGE)
    large = torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    return lambda count: read_all(large.data_ptr(), count, threads.num_threads())


def medians(repeat: int, *candidates) -> list[float]:
    """Seconds of each candidate, measured in turn."""
    times = [[] for _ in candidates]
    for round_ in range(repeat + 1):
        for kept, run in zip(times, candidates, strict=True):
            began = time.perf_counter()
            run()
            if round_:
                kept.append(time.perf_counter() - began)
    return [statistics.median(kept) for kept in times]


def line(
    name: str, seconds: float, *, gigabytes: float = 0, gigaflop: float = 0, floor: float = 0, torch_fp32: float = 0
) -> None:
    text = f"{name:42s} {seconds * 1e6:9.0f} us"
    text += f"  {gigabytes / seconds:6.1f} GB/s" if gigabytes else " " * 13
    text += f"  {gigaflop / seconds:7.1f} GFLOP/s" if gigaflop else " " * 17
    text += f"  {floor / seconds * 100:5.0f} % of a plain read" if floor else ""
    text += f"  {torch_fp32 / seconds:5.2f} x torch fp32" if torch_fp32 else ""
    print(text, flush=True)


def bench_linear(repeat: int, read) -> None:
    for k, n, count in ((896, 4864, LAYERS), (4864, 896, LAYERS), (896, 151936, 1)):
        for kind, pack in (("bf16", linear.pack), ("int8", linear.pack_int8)):
            packed = [pack(torch.randn(n, k).to(BF16)) for _ in range(count)]
            dense = torch.randn(n, k)
            for m in (1, 4, 8, 16, 32, 128, 512) if count > 1 else (1, 8, 32):
                x = torch.randn(m, k).to(BF16)
                xf, out = x.float(), torch.empty(m, n, dtype=BF16)
                ours, floor, fp32 = medians(
                    repeat if m < 128 else 3,
                    lambda: [linear.linear(x, p, out=out) for p in packed],  # noqa: B023
                    lambda: read(sum(p.nbytes for p in packed)),  # noqa: B023
                    lambda: F.linear(xf, dense),  # noqa: B023
                )
                line(
                    f"linear {kind} {k}x{n} M={m}", ours / count, gigabytes=packed[0].nbytes / 1e9, gigaflop=2e-9 * m * n * k,
                    floor=floor / count if m <= 16 else 0, torch_fp32=fp32 if m > 1 else 0,
                )  # fmt: skip


def bench_attention(repeat: int, read) -> None:
    rows, context, heads, kv_heads, dim, block = 32, 512, 14, 2, 64, 16
    blocks = rows * context // block
    caches = [attention.allocate_kv(blocks, block, kv_heads, dim) for _ in range(LAYERS)]
    for kv in caches:
        kv.data.uniform_(-1, 1)
    table = torch.randperm(blocks).int().view(rows, -1)
    q = torch.randn(rows, heads, dim).to(BF16)
    starts, lengths = torch.arange(rows + 1).int(), torch.full((rows,), context).int()
    folded, dense = torch.randn(rows, kv_heads, heads // kv_heads, dim), torch.randn(rows, kv_heads, context, dim)
    ours, floor, sdpa = medians(
        repeat,
        lambda: [attention.paged_attention(q, kv, starts, lengths, table, 0.125) for kv in caches],
        lambda: read(sum(kv.nbytes for kv in caches)),
        lambda: F.scaled_dot_product_attention(folded, dense, dense),
    )
    work = 4e-9 * rows * context * heads * dim
    line(
        "decode 32 rows, context 512",
        ours / LAYERS,
        gigabytes=caches[0].nbytes / 1e9,
        gigaflop=work,
        floor=floor / LAYERS,
        torch_fp32=sdpa,
    )
    k, slots = torch.randn(rows, kv_heads, dim).to(BF16), torch.randperm(blocks * block)[:rows]
    (write,) = medians(repeat, lambda: [attention.write_kv(kv, k, k, slots) for kv in caches])
    line("write_kv 32 tokens", write / LAYERS)
    bench_prefill(repeat, caches[0], heads, dim)
    bench_long(repeat, read)


def bench_prefill(repeat: int, kv: attention.KV, heads: int, dim: int) -> None:
    for count in (128, 512, 2048):
        q, table = torch.randn(count, heads, dim).to(BF16), torch.arange(count // kv.block_size).int()[None]
        dense = torch.randn(1, heads, count, dim)
        starts, lengths = torch.tensor([0, count]).int(), torch.tensor([count]).int()
        ours, sdpa = medians(
            repeat,
            lambda: attention.paged_attention(q, kv, starts, lengths, table, 0.125),  # noqa: B023
            lambda: F.scaled_dot_product_attention(dense, dense, dense, is_causal=True),  # noqa: B023
        )
        line(f"prefill {count} tokens", ours, gigaflop=2e-9 * count * count * heads * dim, torch_fp32=sdpa)


def bench_long(repeat: int, read) -> None:
    context = 16384
    kv = attention.allocate_kv(context // 16, 16, 2, 64)
    kv.data.uniform_(-1, 1)
    q, table = torch.randn(1, 14, 64).to(BF16), torch.randperm(context // 16).int()[None]
    starts, lengths = torch.tensor([0, 1]).int(), torch.tensor([context]).int()
    ours, floor = medians(
        repeat, lambda: attention.paged_attention(q, kv, starts, lengths, table, 0.125), lambda: read(kv.nbytes)
    )
    line(f"decode 1 row, context {context}", ours, gigabytes=kv.nbytes / 1e9, floor=floor)


def bench_pointwise(repeat: int) -> None:
    cos = torch.randn(4096, 32)
    weight, table = torch.randn(896).to(BF16), torch.randn(20000, 896).to(BF16)
    packed = linear.pack(table)
    for rows in (1, 32, 512):
        x, gate = torch.randn(rows, 896).to(BF16), torch.randn(rows, 2 * 4864).to(BF16)
        q, k = torch.randn(rows, 14, 64).to(BF16), torch.randn(rows, 2, 64).to(BF16)
        ids = torch.randint(0, 20000, (rows,))
        logits = torch.randn(min(rows, 32), 151936)
        for name, run in {
            "rms_norm + residual": lambda: pointwise.rms_norm(x, weight, 1e-6, x),  # noqa: B023
            "silu_mul": lambda: pointwise.silu_mul(gate),  # noqa: B023
            "gelu_mul (erf)": lambda: pointwise.gelu_mul(gate),  # noqa: B023
            "rotary": lambda: pointwise.rotary(q, k, cos, cos, ids % 4096),  # noqa: B023
            "embedding": lambda: pointwise.embedding(ids, table),  # noqa: B023
            "embedding from a packed head": lambda: pointwise.embedding(ids, packed),  # noqa: B023
            f"argmax [{len(logits)}, 151936] fp32": lambda: pointwise.argmax(logits),  # noqa: B023
        }.items():
            line(f"{name}, {rows} rows", medians(repeat * 3, run)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    if build.library() is None:
        raise SystemExit("no compiled kernels to measure")
    threads.set_num_threads(options.threads)
    torch.set_num_threads(threads.num_threads())
    read = reader()
    (seconds,) = medians(5, lambda: read(1 << 30))
    print(f"{threads.num_threads()} threads, plain read {(1 << 30) / seconds / 1e9:.1f} GB/s, torch {torch.__version__}")
    with torch.inference_mode():
        bench_linear(options.repeat, read)
        bench_attention(options.repeat, read)
        bench_pointwise(options.repeat)


if __name__ == "__main__":
    main()
