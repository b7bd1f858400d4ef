"""The opened device: what it can do, its memory, and the parts of the runner that it replaces."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from kernel_core.api import Allocation, Capabilities
from kernel_core.nn.api import AttentionSpec, MemoryReport, StepInputBuilder
from kernel_cuda import CudaSection, trial
from kernel_cuda.capture import Capture
from kernel_cuda.forward import MIXED, ForwardGraphs
from kernel_cuda.kernels import pointwise
from kernel_cuda.sampling import FusedSampler
from kernel_cuda.split import RULE, KnownInputs, token_bytes
from kernel_cuda.steady import SteadySteps
from kernel_cuda.steps import FusedAcceptance, FusedDrafting, FusedInputs

BF16 = 8  # compute capability that has it
logger = logging.getLogger("kernel_cuda")


class CudaDevice:
    """One GPU of this process: the one with the number of the rank among those that CUDA shows.

    Raises torch's errors when the GPU does not answer."""

    name = "cuda"

    def __init__(self, section: CudaSection, rank: int) -> None:
        self.torch_device = torch.device("cuda", rank)
        torch.cuda.set_device(self.torch_device)
        torch.backends.cuda.matmul.allow_tf32 = False
        self._section = section
        self._capture: Capture | None = None

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
        self._let_go()
        free, total = torch.cuda.mem_get_info(self.torch_device)
        return MemoryReport(total, free)

    def peak_memory(self, make_runner: Callable[[], Any], sizes: Allocation) -> int:
        """Of one largest step; the graphs' pool, which holds no more than such a step of the most tokens that have graphs; and
        the keys and values that a step gathers for flash, of which the step that is run has fewer than others may have."""
        specs: list[AttentionSpec] = []
        step = self._taken(lambda: specs.extend(trial.run(make_runner, sizes, sizes.max_tokens_per_step)))
        longest = sizes.max_model_len * max((token_bytes(spec) for spec in specs), default=0)
        gathered = min(RULE.most_bytes, longest) if self._section.mixed_flash else 0
        captured = 0
        if self._section.graphs:
            rows = min(self._section.graph_rows, sizes.max_slots)
            captured = min(max(rows, MIXED[-1]) if self._section.model_graphs else rows, sizes.max_tokens_per_step)
        graphs = self._taken(lambda: trial.run(make_runner, sizes, captured)) if captured else 0
        said = "measured: a step of %d tokens takes %d MiB; graphs of up to %d tokens may take %d MiB; %d MiB for gathered KV"
        logger.info(said, sizes.max_tokens_per_step, step >> 20, captured, graphs >> 20, gathered >> 20)
        return step + graphs + gathered

    def _taken(self, step: Callable[[], None]) -> int:
        """Bytes that torch got from the driver for it, at most at once."""
        self._let_go()
        before = torch.cuda.memory_reserved(self.torch_device)
        torch.cuda.reset_peak_memory_stats(self.torch_device)
        step()
        torch.cuda.synchronize(self.torch_device)
        return torch.cuda.max_memory_reserved(self.torch_device) - before

    def _let_go(self) -> None:
        """Give the driver back what nobody holds; a runner and its parts refer to each other."""
        torch.cuda.synchronize(self.torch_device)
        gc.collect()
        torch.cuda.empty_cache()

    def runner_parts(self) -> Mapping[str, Callable[..., Any]]:
        parts: dict[str, Callable[..., Any]] = {
            "sampler": partial(FusedSampler, ranks=self._section.fused_steps),
            "mask": lambda: pointwise.mask_bits,
        }
        inputs: type[StepInputBuilder] = StepInputBuilder
        if self._section.fused_steps:
            inputs = FusedInputs
            parts |= {"acceptance": FusedAcceptance, "drafting": FusedDrafting}
        parts["step_inputs"] = partial(KnownInputs, inputs) if self._section.mixed_flash else inputs
        if self._section.graphs:
            if self._capture is None:
                self._capture = Capture(self.torch_device)
            rows, record = self._section.graph_rows, self._capture
            parts["steady"] = partial(SteadySteps, most_rows=rows, record=record)
            if self._section.model_graphs:
                parts["graphs"] = lambda module, *others: ForwardGraphs(module, record, rows)
        return parts

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.torch_device)

    def close(self) -> None:
        torch.cuda.synchronize(self.torch_device)
        torch.cuda.empty_cache()
