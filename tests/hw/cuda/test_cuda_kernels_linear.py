"""Products of few rows against float64."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from kernel_cuda.kernels import linear
from kernel_cuda.kernels.pointwise import GELU_TANH, SILU

GPU = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]
SIZES = [(1, 40, 96), (5, 33, 520), *([(16, 4096, 4096), (64, 1000, 896), (3, 151936, 896)] if GPU else [])]


def near(a, b, slack=1.0):
    limit = slack * {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[a.dtype]
    assert (a.double() - b).norm() <= limit * b.norm()
    assert a.isfinite().all()


def draw(device, dtype, *shape):
    return (torch.randn(*shape, device=device) * 0.3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_plain(device, dtype, m, n, k):
    torch.manual_seed(0)
    x, w, b = draw(device, dtype, m, k), draw(device, dtype, n, k), draw(device, dtype, n)
    near(linear.few_rows(x, w), x.double() @ w.double().T)
    near(linear.few_rows(x, w, b), x.double() @ w.double().T + b.double())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [SILU, GELU_TANH])
def test_gated(device, dtype, kind):
    torch.manual_seed(0)
    x, w, b = draw(device, dtype, 3, 96), draw(device, dtype, 2 * 40, 96), draw(device, dtype, 80)
    gate, up = (x.double() @ w.double().T + b.double()).chunk(2, -1)
    act = F.silu(gate) if kind == SILU else F.gelu(gate, approximate="tanh")
    near(linear.few_rows(x, w, b, gate=kind), act * up, slack=2)


def test_a_row_does_not_depend_on_the_others(device):
    torch.manual_seed(0)
    x, w = draw(device, torch.float16, 40, 520), draw(device, torch.float16, 33, 520)
    many = linear.few_rows(x, w, shape=linear.Shape(16, 128, 4, 2))
    assert torch.equal(linear.few_rows(x[7:8], w, shape=linear.Shape(16, 128, 4, 2))[0], many[7])


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8(device, dtype):
    torch.manual_seed(0)
    x, b = draw(device, dtype, 5, 288), draw(device, dtype, 40)
    q = torch.randint(-127, 128, (40, 288), dtype=torch.int8, device=device)
    scale = torch.rand(40, device=device) * 0.02
    near(linear.few_rows(x, q, b, scale), x.double() @ (q.double() * scale.double()[:, None]).T + b.double())


@pytest.mark.parametrize("dtype", DTYPES)
def test_e4m3(device, dtype):
    torch.manual_seed(0)
    x, w = draw(device, dtype, 5, 288), torch.randn(40, 288, device=device).to(torch.float8_e4m3fn)
    scale = torch.rand(40, device=device) * 0.02
    want = x.double() @ (w.float().double() * scale.double()[:, None]).T
    near(linear.few_rows(x, w.view(torch.uint8), None, scale), want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int4(device, dtype):
    torch.manual_seed(0)
    x, w = draw(device, dtype, 5, 384), torch.randn(40, 384, device=device)
    packed, scale = linear.pack_int4(w)
    kept = linear.unpack_int4(packed, scale, torch.float64)
    assert (kept - w.double()).abs().max() <= scale.max() / 2 + 1e-6
    near(linear.few_rows_int4(x, packed, scale), x.double() @ kept.T)


@pytest.mark.skipif(not GPU or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8")
def test_rows_as_e4m3(device):
    x = draw(device, torch.bfloat16, 5, 4096)
    y, scale = linear.quantise_rows(x)
    near((y.float() * scale).to(torch.bfloat16), x.double(), slack=5)
