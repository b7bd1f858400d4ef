"""Experts against a loop over tokens in float64."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from kernel_cuda import grouped
from kernel_cuda.kernels import moe
from kernel_cuda.kernels.pointwise import SILU

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
SIZES = [
    (1, 4, 2, 48, 40),
    (7, 3, 2, 48, 40),
    *([(1, 8, 2, 1024, 512), (300, 8, 2, 1024, 512), (1000, 60, 4, 256, 200)] if GPU else []),
]


@pytest.mark.parametrize("renormalise", [False, True])
def test_route(device, renormalise):
    torch.manual_seed(0)
    logits = torch.randn(4, 6, device=device)
    weights, experts = moe.route(logits, 3, renormalise)
    best, at = logits.softmax(-1).topk(3, -1)
    best = best / best.sum(-1, keepdim=True) if renormalise else best
    assert torch.equal(experts.long(), at)
    torch.testing.assert_close(weights, best)


@pytest.mark.parametrize("by_torch", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "count", "top", "hidden", "inner"), SIZES)
def test_experts(device, dtype, tokens, count, top, hidden, inner, by_torch):
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    gate_up = (torch.randn(count, 2 * inner, hidden, device=device) * 0.1).to(dtype)
    down = (torch.randn(count, hidden, inner, device=device) * 0.1).to(dtype)
    weights, experts = moe.route(torch.randn(tokens, count, device=device), top, True)
    multiplied = partial(moe.experts_mlp_by, grouped.multiply) if by_torch else moe.experts_mlp
    out = multiplied(x, gate_up, down, weights, experts, SILU)
    want = torch.zeros(tokens, hidden, dtype=torch.float64, device=device)
    for e in range(count):
        gate, up = (x.double() @ gate_up[e].double().T).chunk(2, -1)
        share = torch.where(experts == e, weights, 0.0).sum(1).double()
        want += share[:, None] * ((F.silu(gate) * up) @ down[e].double().T)
    limit = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
    assert (out.double() - want).norm() <= limit * want.norm()
    assert out.isfinite().all()
