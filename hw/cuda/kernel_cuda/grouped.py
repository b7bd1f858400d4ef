"""Products of rows grouped by expert, by the kernel that torch ships for bf16 on GPUs of capability 9 and 10."""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernel_cuda.kernels.machine import capability

logger = logging.getLogger("kernel_cuda")

MAJORS = (9, 10)  # elsewhere torch multiplies expert by expert, and the host waits
ALIGNED = 8  # elements that sizes must be multiples of


def multiply(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows [M, K] times weight [E, N, K]: those of expert e end at ends int32 [E] → [M, N]."""
    return F.grouped_mm(rows, weight.transpose(1, 2), offs=ends)


@cache
def works(device: torch.device, dtype: torch.dtype) -> bool:
    """Does this torch's kernel compute what it should, without the host waiting for it? Rate: build."""
    if device.type != "cuda" or dtype != torch.bfloat16 or capability(device)[0] not in MAJORS:
        return False
    draw = torch.Generator(device).manual_seed(0)
    rows, weight = (torch.randn(*shape, device=device, generator=draw).to(dtype) for shape in ((40, 64), (3, 32, 64)))
    expert = torch.arange(40, device=device) // 25 * 2  # 25 of the first, none of the second, 15 of the last
    wanted = torch.einsum("mk,mnk->mn", rows.float(), weight.float()[expert])
    ends, mode = torch.tensor([25, 25, 40], dtype=torch.int32, device=device), torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = multiply(rows, weight, ends)
    except (RuntimeError, TypeError, AttributeError) as error:
        logger.warning("experts run without torch's grouped products: %s", error)
        return False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    if not (got.float() - wanted).abs().max() <= 0.02 * wanted.abs().max():
        logger.warning("experts run without torch's grouped products: they compute something else")
        return False
    return True
