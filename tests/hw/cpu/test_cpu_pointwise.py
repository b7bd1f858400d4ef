import pytest
import torch
import torch.nn.functional as F
from kernel_cpu import linear, pointwise

DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(1, 896), (3, 17), (40, 5), (100, 1000), (0, 8)]


def close(got, expected, **tolerance):
    assert got.dtype == expected.dtype
    if not tolerance:
        tolerance = {"rtol": 8e-3, "atol": 1e-3} if got.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 2e-6}
    torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(kernels, dtype, shape):
    x, residual, weight = (torch.randn(s).to(dtype) for s in (shape, shape, shape[1:]))
    for offset in (0, 1):
        for r in (None, residual):
            total = x if r is None else x + r
            y = total.float() * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + 1e-6)
            expected = (y * (1 + weight.float())).to(dtype) if offset else weight * y.to(dtype)
            out, kept = pointwise.rms_norm(x, weight, 1e-6, r, offset)
            close(out, expected)
            assert torch.equal(kept, total)
    out, _ = pointwise.rms_norm(x, None, 1e-6)
    close(out, (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_norm(kernels, dtype, shape):
    x, residual = torch.randn(shape).to(dtype) + 3, torch.randn(shape).to(dtype)
    weight, bias = torch.randn(shape[1]).to(dtype), torch.randn(shape[1]).to(dtype)
    out, kept = pointwise.layer_norm(x, weight, bias, 1e-5, residual)
    assert torch.equal(kept, x + residual)
    expected = F.layer_norm((x + residual).float(), shape[1:], weight.float(), bias.float(), 1e-5).to(dtype)
    close(out, expected, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)
    close(pointwise.layer_norm(x, None, None, 1e-5)[0], F.layer_norm(x.float(), shape[1:]).to(dtype), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "rot"), [(64, 64), (24, 24), (80, 32), (256, 64)])
def test_rotary(kernels, dtype, interleaved, dim, rot):
    angle = torch.arange(50)[:, None] * 10000 ** (-torch.arange(rot // 2) / (rot // 2))
    fused = torch.randn(9, 5 * dim).to(dtype)
    q, k = fused[:, : 3 * dim].view(9, 3, dim), fused[:, 3 * dim :].view(9, 2, dim)
    positions = torch.randint(0, 50, (9,))
    c, s = angle.cos()[positions][:, None], angle.sin()[positions][:, None]

    def expected(x):
        turned = x[..., :rot].float()
        a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
        pair = (a * c - b * s, b * c + a * s)
        y = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
        return torch.cat([y.to(dtype), x[..., rot:]], -1)

    wanted = expected(q), expected(k)
    pointwise.rotary(q, k, angle.cos(), angle.sin(), positions, interleaved)
    close(q, wanted[0])
    close(k, wanted[1])
    before = q.clone()
    pointwise.rotary(q, None, torch.ones(50, rot // 2), torch.zeros(50, rot // 2), positions)
    assert torch.equal(q, before)
    with pytest.raises(IndexError):
        pointwise.rotary(q, k, angle.cos(), angle.sin(), positions + 50)


# Formulas that keep their digits in the far negative tail; torch's own fp32 gelu does not.
def exact_silu(x):
    return x * torch.sigmoid(x)


def exact_gelu(x):
    return x * torch.special.erfc(-x * 0.5**0.5) / 2


def exact_gelu_tanh(x):
    return x * torch.sigmoid((8 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def scattered(dtype, shape):
    x = (torch.randn(shape[0], 2 * shape[1]) * 4).to(dtype)
    x[0, 0], x[0, 1] = 200.0, -200.0
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 4864), (7, 13), (50, 2000)])
def test_gated_activations(kernels, dtype, shape):
    x = scattered(dtype, shape)
    gate, up = x.chunk(2, -1)
    # Two roundings to bf16: an error of one fp32 ulp may show as two bf16 ulps.
    within = {"rtol": 1.6e-2 if dtype == torch.bfloat16 else 1e-5, "atol": 5e-6}
    close(pointwise.silu_mul(x), exact_silu(gate.double()).to(dtype) * up, **within)
    close(pointwise.gelu_mul(x), exact_gelu(gate.double()).to(dtype) * up, **within)
    close(pointwise.gelu_mul(x, "tanh"), exact_gelu_tanh(gate.double()).to(dtype) * up, **within)


def test_compiled_activations_keep_their_digits_in_the_tail(kernels):
    if kernels == "plain":
        pytest.skip("torch's own gelu loses them")
    gate = torch.linspace(-9, 9, 20001)[None]
    x = torch.cat([gate, torch.ones_like(gate)], -1)
    within = {"rtol": 1.5e-5, "atol": 1e-30}
    close(pointwise.gelu_mul(x), exact_gelu(gate.double()).float(), **within)
    close(pointwise.gelu_mul(x, "tanh"), exact_gelu_tanh(gate.double()).float(), **within)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_embedding(kernels, dtype):
    weight, ids = torch.randn(100, 37).to(dtype), torch.tensor([0, 99, 5, 5])
    assert torch.equal(pointwise.embedding(ids, weight), weight[ids])
    assert pointwise.embedding(ids[:0], weight).shape == (0, 37)
    if dtype != torch.float16:
        assert torch.equal(pointwise.embedding(ids, linear.pack(weight)), weight[ids])
    with pytest.raises(IndexError):
        pointwise.embedding(torch.tensor([100]), weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 8, 511, 513, 3000])
def test_argmax(kernels, dtype, width):
    x = torch.randn(33, width).to(dtype)
    x[1] = -torch.inf
    x[2] = 1.0
    x[3, width // 2] = torch.nan
    x[4] = torch.inf
    expected = [(x[i].isnan().nonzero() if x[i].isnan().any() else (x[i] == x[i].max()).nonzero())[0].item() for i in range(33)]
    assert pointwise.argmax(x).tolist() == expected


def test_rows_do_not_depend_on_the_batch(kernels):
    x = torch.randn(2000, 130).to(torch.bfloat16)
    weight = torch.randn(130).to(torch.bfloat16)
    assert torch.equal(pointwise.rms_norm(x, weight, 1e-6)[0][7:9], pointwise.rms_norm(x[7:9], weight, 1e-6)[0])
    assert torch.equal(pointwise.silu_mul(x)[7:9], pointwise.silu_mul(x[7:9]))
