"""Random draws over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_core.nn.api import draw as plain_draw
from kernel_core.nn.api import draw_among
from kernel_cpu import build

ROOM = 16  # tokens of a row that may be as good as tied


def draw(logits: Tensor, key: Tensor, position: Tensor) -> Tensor:
    """The kernel's draw, token for token: logits [n, V] fp32, key int32 [n, 2], position int64 [n] → int64 [n].

    The kernels find the tokens that can win; the kernel's own arithmetic decides between them."""
    kernels = build.library()
    if kernels is None or not len(logits):
        return plain_draw(logits, key, position)
    logits, key, position = logits.contiguous(), key.contiguous(), position.to(torch.int64).contiguous()
    found = torch.empty(len(logits), ROOM, dtype=torch.int64)
    pointers = (x.data_ptr() for x in (logits, key, position, found))
    count = kernels.kc_draw(*pointers, ROOM, *logits.shape)
    if not count:
        return plain_draw(logits, key, position)
    tokens = found[:, :count]
    return draw_among(logits.gather(1, tokens), tokens, key, position)
