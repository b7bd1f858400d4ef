"""Recording what a function launches, to replay it as one CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import perf_counter
from typing import Any, TypeVar
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger("kernel_cuda")
Made = TypeVar("Made")

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
    no two of them run at once. Streams are kept, because libraries keep a workspace for each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._warm, self._capturing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._alive: WeakSet[torch.cuda.CUDAGraph] = WeakSet()
        self._pool: Any = None

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        current = torch.cuda.current_stream(self.device)
        self._warm.wait_stream(current)
        try:
            with torch.cuda.stream(self._warm):
                function()
        finally:
            current.wait_stream(self._warm)
        if not self._alive:  # torch lets no pool be used again of which all graphs are gone
            self._pool = torch.cuda.graph_pool_handle()
        graph, failed = torch.cuda.CUDAGraph(), []
        try:
            with torch.cuda.graph(graph, pool=self._pool, stream=self._capturing, capture_error_mode="thread_local"):
                results = _told(function, failed)
        except RuntimeError as error:  # where ending the capture fails as well, torch raises that
            raise (failed or [error])[0] from None
        finally:
            torch.cuda.set_stream(current)  # then it has not been left
        self._alive.add(graph)
        return graph.replay, results


def _told(function: Callable[[], Any], failed: list[RuntimeError]) -> Any:
    """Its results, or what it raised entered into `failed` as well."""
    try:
        return function()
    except RuntimeError as error:
        failed.append(error)
        raise


class Attempts:
    """Makes the graphs of `name`. `full`: one found no memory, and no further one is made; not `usable`: one could not be
    captured, and none is replayed either."""

    def __init__(self, name: str) -> None:
        self.name, self.usable, self.full = name, True, False

    def __call__(self, make: Callable[[], Made], what: str) -> Made | None:
        """What `make` gives, told as `what`. None: it is not made."""
        if self.full or not self.usable:
            return None
        began = perf_counter()
        try:
            graph = make()
        except torch.OutOfMemoryError as error:
            self.full = True
            logger.warning("no memory for more graphs of %s: %s", self.name, error)
            return None
        except RuntimeError as error:
            self.usable = False
            logger.warning("%s: no CUDA graphs, capturing it failed (%s)", self.name, error)
            return None
        logger.info("a graph of %s, %s: %.2f s", self.name, what, perf_counter() - began)
        return graph


def fill(tensor: Tensor, array: np.ndarray) -> None:
    """Copy a host array into a device tensor that stays, without waiting."""
    source = torch.from_numpy(array)
    tensor.copy_(source.pin_memory() if tensor.is_cuda else source, non_blocking=True)
