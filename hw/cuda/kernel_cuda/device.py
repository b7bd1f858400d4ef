"""The opened device: what it can do, its memory, and the parts of the runner that it replaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from kernel_core.api import Capabilities
from kernel_core.nn.api import MemoryReport, Sampler
from kernel_cuda import CudaSection
from kernel_cuda.kernels import sampling
from kernel_cuda.steady import SteadySteps

BF16 = 8  # compute capability that has it


class CudaDevice:
    """One GPU of this process: the one with the number of the rank among those that CUDA shows.

    Raises torch's errors when the GPU does not answer."""

    name = "cuda"

    def __init__(self, section: CudaSection, rank: int) -> None:
        self.torch_device = torch.device("cuda", rank)
        torch.cuda.set_device(self.torch_device)
        torch.backends.cuda.matmul.allow_tf32 = False
        self._section = section

    def capabilities(self) -> Capabilities:
        major, _ = torch.cuda.get_device_capability(self.torch_device)
        return Capabilities(
            dtypes=(*(("bfloat16",) if major >= BF16 else ()), "float16", "float32"),
            block_sizes=(16, 32, 64, 128),
            same_step_reads=True,
            async_submit=True,
            graph_mode="decode" if self._section.graphs else "none",
        )

    def memory(self) -> MemoryReport:
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return MemoryReport(total, free)

    def runner_parts(self) -> Mapping[str, Callable[..., Any]]:
        parts: dict[str, Callable[..., Any]] = {"sampler": partial(Sampler, argmax=sampling.argmax, draw=sampling.draw)}
        if self._section.graphs:
            parts["steady"] = partial(SteadySteps, most_rows=self._section.graph_rows)
        return parts

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def close(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()
