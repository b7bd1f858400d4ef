"""A plugin for measurements and tests: `executor = "null_executor"` runs any model on a device that computes nothing.

`install(folder)` makes a distribution of this file; processes with that folder in PYTHONPATH find it."""

from __future__ import annotations

import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

from kernel_core.api import BuildContext, Executor, Manifest, Section, hookimpl

NAME = "null_executor"


class NullSection(Section):
    vocab_size: int = 1000
    step_seconds: float = 0.0  # that a step takes, without using the CPU
    refuses: str = ""  # raised as a CapacityError at the start
    max_model_len: int = 4096


manifest = Manifest(name=NAME, summary="computes nothing", section=NullSection)


@hookimpl
def make_executor(context: BuildContext, plan: bytes) -> Executor:
    from kernel_core.api import CapacityError, StepPlan, StepResult
    from kernel_core.testing.null import NullExecutor, NullHandle

    section: NullSection = context.section
    if section.refuses:
        raise CapacityError(section.refuses)

    class PacedExecutor(NullExecutor):
        """A step begins when it is submitted, or when the one before it ends, and ends `step_seconds` later."""

        def __init__(self, **keys: Any) -> None:
            super().__init__(**keys)
            self.ends: deque[float] = deque()
            self.free = 0.0  # when the last step ends

        def submit(self, plan: StepPlan) -> NullHandle:
            self.free = max(self.free, time.monotonic()) + section.step_seconds
            self.ends.append(self.free)
            return super().submit(plan)

        def finish(self, plan: StepPlan) -> StepResult:
            left = self.ends.popleft() - time.monotonic()
            if left > 0:
                time.sleep(left)
            return super().finish(plan)

    return PacedExecutor(vocab_size=section.vocab_size, max_model_len=section.max_model_len, kv_budget_bytes=1 << 20)


def install(folder: Path) -> Path:
    """→ the folder, which is now one for PYTHONPATH."""
    shutil.copy(__file__, folder / f"kernel_{NAME}.py")
    metadata = folder / f"kernel_{NAME}-0.1.0.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernel-null-executor\nVersion: 0.1.0\nSummary: null\n")
    (metadata / "entry_points.txt").write_text(f"[kernel_core.plugins]\n{NAME} = kernel_{NAME}\n")
    return folder
