"""Linear layers over packed weights: bf16, fp32, and weight-only int8."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_cpu import build

_FORMATS = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2}


@dataclass(frozen=True)
class PackedLinear:
    """A weight [out_features, in_features] in the layout of the kernels of this machine.

    ``data``: panels of NR output channels (NR = 16, with AVX-512 32), each [K/2, NR, 2] for bf16 and [K, NR] for fp32 and
    int8, with K padded to even and N to NR: no second copy of the weight is kept, ``nbytes`` is what it occupies.
    ``scale``: fp32 [out_features] for int8. Without a compiled kernel ``data`` is the plain [N, K] tensor (``panel`` 0).
    """

    data: Tensor
    out_features: int
    in_features: int
    scale: Tensor | None = None
    panel: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (self.scale.nbytes if self.scale is not None else 0)


def pack(weight: Tensor) -> PackedLinear:
    """Packs weight [N, K], bf16 or fp32, rows contiguous. Raises TypeError or ValueError for anything else."""
    _check_weight(weight)
    kernels = build.library()
    n, k = weight.shape
    if kernels is None:
        return PackedLinear(weight.contiguous(), n, k)
    data = _panels(kernels, weight.dtype, n, k)
    kernels.kc_pack(weight.data_ptr(), weight.stride(0), _FORMATS[weight.dtype], data.data_ptr(), n, k)
    return PackedLinear(data, n, k, panel=kernels.kc_panel())


def pack_int8(weight: Tensor) -> PackedLinear:
    """Quantises weight [N, K], bf16 or fp32, to int8 with one symmetric scale per output channel, and packs it.

    The weight that it stands for is ``scale[:, None] * q`` with q in [-127, 127]. Raises as ``pack`` does.
    """
    _check_weight(weight)
    kernels = build.library()
    n, k = weight.shape
    if kernels is None:
        top = weight.float().abs().amax(1) if k else torch.zeros(n)
        inverse = torch.where(top > 0, 127.0 / top, torch.zeros(()))
        return PackedLinear((weight.float() * inverse[:, None]).round().to(torch.int8), n, k, top / 127.0)
    data = _panels(kernels, torch.int8, n, k)
    scale = torch.empty(n, dtype=torch.float32)
    is_bf16 = weight.dtype == torch.bfloat16
    kernels.kc_pack_int8(weight.data_ptr(), is_bf16, weight.stride(0), data.data_ptr(), scale.data_ptr(), n, k)
    return PackedLinear(data, n, k, scale, kernels.kc_panel())


def linear(x: Tensor, packed: PackedLinear, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [M, K] (bf16 or fp32, rows contiguous) times the packed weight, plus bias [N]; returns [M, N] in x.dtype.

    Accumulates in fp32, one accumulator per output in the order of k, and rounds once: row i is bitwise the same
    whatever M and the other rows are. ``out`` receives the result and is returned. ``bias`` is bf16 or fp32.
    Raises ValueError for shapes that do not fit and TypeError for other dtypes.
    """
    m, k = x.shape
    n = packed.out_features
    if k != packed.in_features or (bias is not None and bias.shape != (n,)):
        raise ValueError(
            f"x {tuple(x.shape)} and bias {None if bias is None else tuple(bias.shape)} for weight {[n, packed.in_features]}"
        )
    if out is None:
        out = torch.empty(m, n, dtype=x.dtype)
    elif out.shape != (m, n) or out.dtype != x.dtype or (n > 1 and out.stride(1) != 1):
        raise ValueError(f"out {tuple(out.shape)} {out.dtype} for a result {[m, n]} {x.dtype}")
    if not packed.panel:
        return out.copy_(_plain(x, packed, bias))
    is_bf16 = x.dtype == torch.bfloat16
    if not (is_bf16 or x.dtype == torch.float32) or (bias is not None and bias.dtype not in (torch.bfloat16, torch.float32)):
        raise TypeError(f"activations {x.dtype}, bias {bias.dtype if bias is not None else None}: expected bf16 or fp32")
    if k > 1 and x.stride(1) != 1:
        x = x.contiguous()
    kernels = build.library()
    assert kernels is not None
    kernels.kc_linear(
        x.data_ptr(), is_bf16, x.stride(0), packed.data.data_ptr(), _FORMATS[packed.data.dtype],
        None if packed.scale is None else packed.scale.data_ptr(),
        None if bias is None else bias.data_ptr(), bias is not None and bias.dtype == torch.bfloat16,
        out.data_ptr(), out.stride(0), m, n, k,
    )  # fmt: skip
    return out


def linear_int8(x: Tensor, packed: PackedLinear, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``linear`` over a weight from ``pack_int8``: the weight is int8, activations and sums are not quantised."""
    if packed.dtype != torch.int8:
        raise TypeError(f"linear_int8 needs a weight from pack_int8, not {packed.dtype}")
    return linear(x, packed, bias, out)


def unpack(packed: PackedLinear) -> Tensor:
    """The weight [N, K] again, bitwise for bf16 and fp32; for int8 the fp32 weight that it stands for."""
    if packed.dtype == torch.int8:
        return linear(torch.eye(packed.in_features), packed).t().contiguous()
    return unpack_rows(packed, torch.arange(packed.out_features))


def unpack_rows(packed: PackedLinear, ids: Tensor) -> Tensor:
    """Rows ids (int64 [n]) of a packed bf16 or fp32 weight, [n, K]: the embedding of a tied head without a second copy.

    Raises IndexError for an id outside the weight, TypeError for int8.
    """
    if packed.dtype == torch.int8:
        raise TypeError("rows of an int8 weight cannot be unpacked")
    if not packed.panel:
        return packed.data[ids]
    out = torch.empty(len(ids), packed.in_features, dtype=packed.dtype)
    kernels = build.library()
    assert kernels is not None
    ids = ids.contiguous()
    if kernels.kc_unpack_rows(
        packed.data.data_ptr(),
        _FORMATS[packed.dtype],
        ids.data_ptr(),
        len(ids),
        out.data_ptr(),
        packed.out_features,
        packed.in_features,
    ):
        raise IndexError(f"row id out of range for {packed.out_features} rows")
    return out


def _check_weight(weight: Tensor) -> None:
    if weight.dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"weight {weight.dtype}: expected bf16 or fp32")
    if weight.dim() != 2 or (weight.shape[1] > 1 and weight.stride(1) != 1):
        raise ValueError(f"weight {tuple(weight.shape)} with strides {weight.stride()}: expected [N, K] with contiguous rows")


def _panels(kernels: ctypes.CDLL, dtype: torch.dtype, n: int, k: int) -> Tensor:
    panel = kernels.kc_panel()
    data = torch.empty((n + panel - 1) // panel, (k + 1) // 2 * 2, panel, dtype=dtype)
    if data.nbytes >= 1 << 21:
        kernels.kc_advise_huge(data.data_ptr(), data.nbytes)
    return data


def _plain(x: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """fp32 products over slices of the weight: bf16 products are far slower on machines without bf16 instructions."""
    rows = max(1, (1 << 22) // max(1, packed.in_features))
    y = torch.cat([x.float() @ part.float().t() for part in packed.data.split(rows)], 1)
    if packed.scale is not None:
        y *= packed.scale
    return (y if bias is None else y + bias.float()).to(x.dtype)
