"""Two ops of the device's own, with the signatures and facts that kernel_core/nn/ops.py states. The others are its references."""

import torch.nn.functional as F


def register(ops):
    ops.register("rms_norm", rms_norm, owner="toy", predicate=lambda facts: facts["offset"] == 0)
    ops.register("silu_mul", silu_mul, owner="toy")


def rms_norm(x, weight, eps, residual=None, offset=0):
    total = x if residual is None else x + residual
    return F.rms_norm(total, weight.shape, weight, eps), total


def silu_mul(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate).mul_(up)
