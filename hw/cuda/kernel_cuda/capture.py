"""Recording what a function launches, to replay it as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALL = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128)
STRIDE = 32  # between larger sizes
LENGTHS = (8192, 65536)  # KV lengths that have graphs of their own, beside the longest

#: function → (replay, what it gave, at addresses that every replay fills again)
Record = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


def sizes_up_to(most: int) -> list[int]:
    """The numbers of rows, or tokens, that have graphs."""
    return [*(n for n in SMALL if n < most), *range(SMALL[-1] + STRIDE, most, STRIDE), most]


class Capture:
    """The `Record` of a GPU. The function runs once beforehand, so that kernels are compiled and libraries have their memory; it
    must do the same again and change nothing in these two runs. Other threads may use CUDA meanwhile. All graphs share one pool:
    no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            results = function()
        return graph.replay, results


def fill(tensor: Tensor, array: np.ndarray) -> None:
    """Copy a host array into a device tensor that stays, without waiting."""
    source = torch.from_numpy(array)
    tensor.copy_(source.pin_memory() if tensor.is_cuda else source, non_blocking=True)
