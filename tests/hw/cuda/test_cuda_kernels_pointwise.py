"""Norms, rotation, activations, rows and masks against the references of the ops, written out."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from kernel_cuda.kernels import pointwise

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if torch.cuda.is_available() else [])]


def near(a, b):
    limit = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[a.dtype]
    assert (a.double() - b.double()).norm() <= limit * b.double().norm() + 1e-9
    assert a.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("size", [24, 640])
def test_rms_norm(device, dtype, offset, size):
    torch.manual_seed(0)
    x, r, w = (torch.randn(*shape, device=device).to(dtype) for shape in ((5, size), (5, size), (size,)))
    for residual in (None, r):
        y, total = pointwise.rms_norm(x, w, 1e-5, residual, offset)
        want = x if residual is None else x + r
        wide = want.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
        near(y, scaled * (1 + w.float()) if offset else scaled.to(dtype) * w)
        assert torch.equal(total, want)


def test_norms_of_views(device):
    qkv = torch.randn(3, 4, 40, device=device)
    rows = qkv[:, 1]
    near(pointwise.rms_norm(rows, torch.ones(40, device=device), 0.0)[0], rows * rows.square().mean(-1, True).rsqrt())


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(device, dtype):
    torch.manual_seed(0)
    x, r, w, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((3, 72), (3, 72), (72,), (72,)))
    for weight, bias, residual in ((w, b, None), (w, None, r), (None, None, r)):
        y, total = pointwise.layer_norm(x, weight, bias, 1e-5, residual)
        want = x if residual is None else x + r
        near(y, F.layer_norm(want, (72,), weight, bias, 1e-5))
        assert torch.equal(total, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_of_views(device, dtype, interleaved):
    torch.manual_seed(0)
    qkv = torch.randn(3, 13, 24, device=device).to(dtype)
    q, k = qkv[:, :9], qkv[:, 9:12]
    angles = torch.rand(20, 10, device=device) * 6
    cos, sin, at = angles.cos(), angles.sin(), torch.tensor([4, 0, 19], device=device)
    c, s = cos[at][:, None].double(), sin[at][:, None].double()
    before = qkv.double().clone()
    pairs = before[..., :20].unflatten(-1, (10, 2) if interleaved else (2, 10))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack([a * c - b * s, b * c + a * s], -1 if interleaved else -2).flatten(-2)
    want = torch.cat([turned, before[..., 20:]], -1)
    pointwise.rotary(q, k, cos, sin, at, interleaved)
    near(q, want[:, :9])
    near(k, want[:, 9:12])
    assert torch.equal(qkv[:, 12:].double(), before[:, 12:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [pointwise.SILU, pointwise.GELU, pointwise.GELU_TANH])
def test_gated_activations(device, dtype, kind):
    torch.manual_seed(0)
    x = (torch.randn(3, 2 * 1100, device=device) * 3).to(dtype)
    act = {0: F.silu, 1: F.gelu, 2: lambda g: F.gelu(g, approximate="tanh")}[kind]
    gate, up = x.chunk(2, -1)
    near(pointwise.act_mul(x, kind), act(gate) * up)


def test_embedding(device):
    weight, ids = torch.randn(50, 72, device=device), torch.tensor([3, 49, 0, 3], device=device)
    assert torch.equal(pointwise.embedding(ids, weight), weight[ids])


def test_bit_masks(device):
    torch.manual_seed(0)
    logits = torch.randn(4, 5000, device=device)
    allowed = torch.rand(2, 5024) > 0.5
    bits = (allowed.view(2, -1, 32).long() << torch.arange(32)).sum(-1)
    words = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().to(device)
    want = logits.clone()
    want[[3, 1]] = want[[3, 1]].masked_fill(~allowed[:, :5000].to(device), -torch.inf)
    pointwise.mask_bits(logits, torch.tensor([3, 1], device=device), words)
    assert torch.equal(logits, want)
