"""Compiles the kernels as real launches ask for them, without a GPU, and prints what each one uses.

    python compile_kernels.py 90 [part of a kernel's name and case]

Launch functions run on meta tensors; a launch is recorded instead of done, then compiled for that architecture. Output: a line
of JSON a kernel with its registers, spilled bytes and shared memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.int8: "i8", torch.bool: "i1", torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
LAUNCHES: dict[str, tuple] = {}
LABEL = [""]


def record(kernel, *args, grid, warmup, **kwargs):
    names = [p.name for p in kernel.params]
    options = {k: v for k, v in kwargs.items() if k not in names}
    given = dict(zip(names, args)) | {k: v for k, v in kwargs.items() if k in names}
    LAUNCHES.setdefault(f"{kernel.fn.__name__.lstrip('_')} {LABEL[0]}".strip(), (kernel, given, options))


def source(kernel, given):
    signature, constants, attributes = {}, {}, {}
    for index, param in enumerate(kernel.params):
        value = given[param.name]
        if param.is_constexpr or (type(value) is int and value == 1 and not param.do_not_specialize):
            signature[param.name] = "constexpr"
            constants[param.name] = value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[param.name] = "fp32"
        else:
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not param.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def usage(compiled):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": found["REG"], "spilled": found["STACK"] + found["LOCAL"], "shared": compiled.metadata.shared}


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention(dim, dtype, queries, heads=32, kv_heads=8, fp8=False, window=None, tree=False, capped=False):
    from kernel_cuda.kernels import attention as kernels

    kept = torch.uint8 if fp8 else dtype
    parts = (meta(1000, kv_heads, 16, dim, dtype=kept) for _ in range(2))
    cache = kernels.Cache(*parts, meta(1000, kv_heads, 16, 2, dtype=torch.float32) if fp8 else None)
    tokens = 8 * queries
    q, table = meta(tokens, heads, dim, dtype=dtype), meta(8192, dim // 2, dtype=torch.float32)
    at, norm = meta(tokens, dtype=torch.int64), meta(dim, dtype=dtype)
    kernels.prepare(q, q[:, :kv_heads], q[:, :kv_heads], cache, at, table, table, at, False, norm, norm)
    kernels.write(cache, q[:, :kv_heads], q[:, :kv_heads], meta(tokens, dtype=torch.int64))
    ints = [meta(n, dtype=torch.int32) for n in (9, 8)]
    row_bytes = 4 * heads * (dim + 1)
    work = kernels.plan(*ints, queries, 8192, tokens, heads // kv_heads, window, row_bytes, dtype == torch.float32)
    links = meta(tokens, queries, dtype=torch.bool) if tree else None
    rules = kernels.Rules(dim**-0.5, window, 50.0 if capped else None)
    sinks = meta(heads, dtype=torch.float32) if capped else None
    kernels.attend(q, cache, work, meta(8, 512, dtype=torch.int32), rules, sinks, tree=links)
    kernels.copy_tokens(cache, *(meta(8, dtype=torch.int64) for _ in range(2)))
    if not fp8:
        kernels.gather(cache, meta(4096, dtype=torch.int64))


def pointwise():
    from kernel_cuda.kernels import pointwise as kernels

    x, w = meta(64, 4096), meta(4096)
    kernels.rms_norm(x, w, 1e-5, x)
    kernels.layer_norm(x, w, w, 1e-5, x)
    kernels.act_mul(meta(64, 28672), kernels.SILU)
    kernels.embedding(meta(64, dtype=torch.int64), meta(1000, 4096))
    kernels.mask_bits(meta(64, 128256, dtype=torch.float32), meta(8, dtype=torch.int64), meta(8, 4008, dtype=torch.int32))
    qkv, tables = meta(64, 48, 128), meta(8192, 64, dtype=torch.float32)
    kernels.rotary(qkv[:, :32], qkv[:, 32:40], tables, tables, meta(64, dtype=torch.int64))


def linear(rows):
    from kernel_cuda.kernels import linear as kernels

    x = meta(rows, 4096)
    kernels.few_rows(x, meta(6144, 4096))


def gated(rows):
    from kernel_cuda.kernels import linear as kernels

    kernels.few_rows(meta(rows, 4096), meta(28672, 4096), gate=0)


def quantised(rows, dtype=torch.bfloat16):
    from kernel_cuda.kernels import linear as kernels

    x, scale = meta(rows, 4096, dtype=dtype), meta(6144, dtype=torch.float32)
    kernels.few_rows(x, meta(6144, 4096, dtype=torch.uint8), None, scale)
    kernels.few_rows_int4(x, meta(6144, 2048, dtype=torch.uint8), meta(6144, 32, dtype=torch.float32))
    if kernels.capability(x.device) >= (8, 9):
        kernels.quantise_rows(x)


def int8(rows):
    from kernel_cuda.kernels import linear as kernels

    kernels.few_rows(meta(rows, 4096), meta(6144, 4096, dtype=torch.int8), None, meta(6144, dtype=torch.float32))


def moe(tokens):
    from kernel_cuda.kernels import moe as kernels

    weights, experts = kernels.route(meta(tokens, 8), 2, True)
    given = meta(tokens, 4096), meta(8, 28672, 4096), meta(8, 4096, 14336), weights, experts, 0
    kernels.experts_mlp(*given)
    kernels.experts_mlp_by(lambda rows, weight, ends: meta(len(rows), weight.shape[1]), *given)


def sampling():
    from kernel_cuda.kernels import sampling as kernels

    logits, numbers = meta(64, 128256), [meta(64, dtype=d) for d in (torch.float32, torch.float32, torch.int32, torch.float32)]
    key, at = meta(64, 2, dtype=torch.int32), meta(64, dtype=torch.int64)
    kernels.argmax(logits)
    kernels.sample(logits, at, at, *numbers, key, filters=False)
    kernels.sample(logits, at, at, *numbers, key)
    kernels.rank(logits.float(), at, 5, False)
    for filters in (False, True):
        kernels.filtered(logits.float(), at, *numbers, filters)


def small_arrays():
    from kernel_cuda.kernels import drafts as kernels

    wide, ints, flags = meta(64, dtype=torch.int64), meta(64, dtype=torch.int32), meta(64, dtype=torch.int8)
    drafts, parents, tokens = meta(64, 4, dtype=torch.int64), meta(64, 4, dtype=torch.int32), meta(64, 8193, dtype=torch.int32)
    table = meta(64, 512, dtype=torch.int32)
    state = tokens, ints, ints, drafts
    kernels.rows[(8,)](
        wide, wide, wide, wide, *state, parents, ints, ints, ints, wide, ints, drafts, parents, wide, wide, ints, wide, parents,
        wide, 8, 4, 8193, 4, W=8, num_warps=1,
    )  # fmt: skip
    kernels.tokens_of_rows[(8, 4)](
        wide, wide, wide, wide, *state, table, wide, wide, wide, table, 8193, 4, 512, 512, 16, 8192, IDS=True, BLOCK=128,
        num_warps=1,
    )  # fmt: skip
    kernels.accept[(8,)](
        wide, wide, wide, wide, flags, drafts, ints, ints, tokens, ints, ints, drafts, wide, wide, drafts, flags, parents,
        parents, 8, 4, 8193, 8192, W=8, num_warps=1,
    )  # fmt: skip
    kernels.view[(8,)](
        wide, ints, wide, ints, ints, ints, wide, tokens, ints, ints, ints, wide, ints, ints, drafts, wide, wide, wide, flags,
        4, 4, 8193, 8192, W=8, num_warps=1,
    )  # fmt: skip
    kernels.keep[(8,)](wide, drafts, ints, ints, drafts, parents, wide, 128256, 4, 4, 1, 4, W=4, num_warps=1)
    kernels.catch_up[(8, 4)](
        wide, ints, wide, wide, ints, ints, wide, wide, drafts, tokens, table, wide, wide, wide, wide, wide, table, wide, ints,
        ints, 8, 4, 1, 8193, 512, 512, 16, 8192, IDS=True, BLOCK=128, num_warps=1,
    )  # fmt: skip
    kernels.advance[(8, 4)](
        wide, wide, flags, wide, table, wide, wide, wide, table, ints, 1, 4, 512, 512, 16, 8192, BLOCK=128, num_warps=1
    )


def steady():
    from kernel_cuda.kernels import steps as kernels

    rows, tokens, ints = meta(64, dtype=torch.int64), meta(65, 8193, dtype=torch.int32), meta(65, dtype=torch.int32)
    kernels.begin(rows, tokens, ints, meta(65, 512, dtype=torch.int32), 64, 8192, 16)
    kernels.end(rows, meta(64, 128256), None, tokens, ints, ints, 64, 8192)


def history():
    from kernel_cuda.kernels import history as kernels

    wide, ints, tokens = meta(64, dtype=torch.int64), meta(64, dtype=torch.int32), meta(64, 8193, dtype=torch.int32)
    logits, numbers, counts = (meta(64, n, dtype=t) for n, t in ((128256, WIDE), (3, WIDE), (128256, torch.int32)))
    ancestors, drafts = meta(64, 5, dtype=torch.int32), meta(64, 5, dtype=torch.int64)
    kernels.penalise(logits, wide, wide, wide, tokens, ints, ints, ancestors, drafts, numbers, counts, 8192)
    kernels.look_up(tokens, wide, wide, 8192, 2, 4, 4)
    step = SimpleNamespace(slot=wide, row=wide, position=wide, history=tokens, known=ints, num_prompt=ints)
    step.ancestors, step.drafts = ancestors, drafts
    kernels.ban(logits, meta(300, 5, dtype=torch.int64), step)


HALF, WIDE = torch.bfloat16, torch.float32
CASES = {
    "decode 64": lambda: attention(64, HALF, 1),
    "decode 128": lambda: attention(128, HALF, 1),
    "decode 256": lambda: attention(256, HALF, 1),
    "decode e4m3": lambda: attention(128, HALF, 1, fp8=True),
    "decode float32": lambda: attention(128, WIDE, 1),
    "verify window tree": lambda: attention(128, HALF, 5, window=4096, tree=True),
    "decode float16": lambda: attention(96, torch.float16, 1),
    "decode capped": lambda: attention(256, HALF, 1, capped=True, window=4096),
    "verify float32": lambda: attention(256, WIDE, 16),
    "verify float32 e4m3": lambda: attention(256, WIDE, 16, fp8=True),
    "prefill tree": lambda: attention(128, HALF, 32, tree=True),
    "prefill wide heads": lambda: attention(256, WIDE, 512),
    "prefill 64": lambda: attention(64, HALF, 512),
    "prefill 128": lambda: attention(128, HALF, 512),
    "prefill 256": lambda: attention(256, HALF, 512, window=1024),
    "prefill capped": lambda: attention(128, HALF, 512, capped=True),
    "prefill float32": lambda: attention(128, WIDE, 512),
    "pointwise": pointwise,
    "plain 1": lambda: linear(1),
    "plain 64": lambda: linear(64),
    "gated 1": lambda: gated(1),
    "e4m3 1": lambda: quantised(1),
    "int8 1": lambda: int8(1),
    "e4m3 64": lambda: quantised(64),
    "float32 64": lambda: quantised(64, WIDE),
    "int8 64": lambda: int8(64),
    "prefill e4m3": lambda: attention(256, HALF, 512, fp8=True),
    "moe 8": lambda: moe(8),
    "moe 512": lambda: moe(512),
    "sampling": sampling,
    "steady": steady,
    "small arrays": small_arrays,
    "history": history,
}


def main(architecture, part=""):
    from kernel_cuda.kernels import attention as kernels
    from kernel_cuda.kernels import linear as linears
    from kernel_cuda.kernels import machine

    machine.capability = kernels.capability = linears.capability = lambda device: divmod(int(architecture), 10)
    named = [label for label in CASES if label in part] or CASES
    for label in named:
        LABEL[0] = label
        CASES[label]()
    for name, (kernel, given, options) in LAUNCHES.items():
        if part not in name or (name.split()[0] in COMMON and not name.endswith(COMMON[name.split()[0]])):
            continue
        compiled = triton.compile(source(kernel, given), target=GPUTarget("cuda", int(architecture), 32), options=options)
        print(json.dumps({"kernel": name, **usage(compiled)}), flush=True)


COMMON = {  # kernels that do not change much from case to case: compiled once
    "plan": "prefill 128", "combine": ("decode 128", "decode capped"),
    "gather_tokens": "decode 128", "scatter_tokens": "decode 128",
    "gather_kv": ("decode 64", "decode 128", "decode 256"),
    "prepare": ("decode 128", "decode e4m3"), "write": ("decode 128", "decode e4m3"),
    "route": "moe 8", "sum_experts": "moe 8", "weigh": "moe 8",
    "short": (
        "decode 64", "decode 128", "decode 256", "decode e4m3", "decode float32", "decode float16", "decode capped",
        "verify window tree", "verify float32", "verify float32 e4m3",
    ),
}  # fmt: skip

if __name__ == "__main__":
    JITFunction.run = record
    main(*sys.argv[1:])
