import pytest
import torch
from kernel_cpu import linear as lin

SHAPES = [(33, 7), (128, 64), (200, 1031), (17, 1), (1, 96)]
DTYPES = [torch.bfloat16, torch.float32]


def close(got, expected):
    assert got.dtype == expected.dtype
    tolerance = {"rtol": 1e-2, "atol": 2e-2} if got.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(got, expected, **tolerance)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("w_dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_equals_fp32_reference(kernels, n, k, w_dtype, x_dtype):
    weight = torch.randn(n, k, dtype=torch.bfloat16 if w_dtype == torch.int8 else w_dtype)
    packed = lin.pack_int8(weight) if w_dtype == torch.int8 else lin.pack(weight)
    dense = lin.unpack(packed).float()
    if w_dtype == torch.int8:
        assert ((dense - weight.float()).abs() <= packed.scale[:, None] * 0.501).all()
    else:
        assert torch.equal(dense, weight.float())
    bias = torch.randn(n, dtype=x_dtype)
    for m in (0, 1, 5, 23):
        x = torch.randn(m, k, dtype=x_dtype)
        close(lin.linear(x, packed, bias), (x.float() @ dense.t() + bias.float()).to(x_dtype))
        close(lin.linear(x, packed), (x.float() @ dense.t()).to(x_dtype))


@pytest.mark.parametrize("w_dtype", [*DTYPES, torch.int8])
@pytest.mark.parametrize("x_dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch(kernels, w_dtype, x_dtype):
    if kernels == "plain":
        pytest.skip("torch's products depend on the batch")
    n, k = 100, 1750
    weight = torch.randn(n, k)
    packed = lin.pack_int8(weight) if w_dtype == torch.int8 else lin.pack(weight.to(w_dtype))
    x = torch.randn(700, k, dtype=x_dtype)
    whole = lin.linear(x, packed)
    for m in (*range(1, 27), 33, 96, 97, 481, 577):
        at = (m * 37) % (700 - m)
        assert torch.equal(lin.linear(x[at : at + m], packed), whole[at : at + m]), m
    order = torch.randperm(700)
    assert torch.equal(lin.linear(x[order], packed), whole[order])


def test_out_views_and_strides(kernels):
    weight, bias = torch.randn(48, 32), torch.randn(48)
    packed = lin.pack(weight)
    x = torch.randn(6, 80)[:, 10:42]
    wide = torch.full((6, 100), 7.0)
    out = lin.linear(x, packed, bias, out=wide[:, 20:68])
    close(out, x @ weight.t() + bias)
    assert (wide[:, :20] == 7).all() and (wide[:, 68:] == 7).all()
    close(lin.linear(x.t().contiguous().t(), packed, bias), x @ weight.t() + bias)
    rows = torch.randn(48, 64)[:, :32]
    assert torch.equal(lin.unpack(lin.pack(rows)), rows)


@pytest.mark.parametrize("rows", [1, 3, 4, 7, 12, 29])
def test_rows_that_begin_anywhere(kernels, rows):
    wide = torch.randn(rows, 81, dtype=torch.bfloat16)
    packed = lin.pack(torch.randn(40, 33, dtype=torch.bfloat16))
    for begin in (0, 7, 48):
        x = wide[:, begin : begin + 33]
        close(lin.linear(x, packed), (x.float() @ lin.unpack(packed).float().t()).to(torch.bfloat16))


def test_zero_rows_of_the_weight_quantise_to_zero(kernels):
    packed = lin.pack_int8(torch.zeros(20, 16))
    assert torch.equal(lin.linear_int8(torch.randn(3, 16), packed), torch.zeros(3, 20))


def test_nan_stays_in_its_row(kernels):
    packed = lin.pack(torch.randn(40, 24))
    x = torch.randn(9, 24)
    expected = lin.linear(x, packed)
    x[4, 3] = torch.nan
    got = lin.linear(x, packed)
    assert got[4].isnan().all()
    keep = torch.arange(9) != 4
    close(got[keep], expected[keep])


@pytest.mark.parametrize("dtype", DTYPES)
def test_unpack_rows(kernels, dtype):
    weight = torch.randn(70, 33, dtype=dtype)
    packed, ids = lin.pack(weight), torch.tensor([0, 69, 3, 3, 16])
    assert torch.equal(lin.unpack_rows(packed, ids), weight[ids])
    with pytest.raises(IndexError):
        lin.unpack_rows(packed, torch.tensor([70]))


def test_refusals(kernels):
    packed = lin.pack(torch.randn(8, 16))
    with pytest.raises(ValueError):
        lin.linear(torch.randn(2, 15), packed)
    with pytest.raises(ValueError):
        lin.linear(torch.randn(2, 16), packed, out=torch.empty(2, 9))
    with pytest.raises(TypeError):
        lin.linear_int8(torch.randn(2, 16), packed)
    with pytest.raises(TypeError):
        lin.pack(torch.randn(8, 16, dtype=torch.float16))
    with pytest.raises(ValueError):
        lin.pack(torch.randn(16, 8).t())


def test_packed_weight_is_the_only_copy(kernels):
    weight = torch.randn(160, 64, dtype=torch.bfloat16)
    assert lin.pack(weight).nbytes == weight.nbytes
    assert lin.pack_int8(weight).nbytes == weight.nbytes // 2 + 160 * 4
