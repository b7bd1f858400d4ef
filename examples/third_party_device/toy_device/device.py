"""What the toy device can do, as data, and its memory."""

import os

import torch

from kernel_core.api import Capabilities
from kernel_core.nn.api import MemoryReport


class ToyDevice:
    name = "toy"
    torch_device = torch.device("cpu")

    def capabilities(self):
        """Only float32, blocks of 8 tokens, and one prompt chunk a step: the scheduler keeps to it."""
        return Capabilities(dtypes=("float32",), block_sizes=(8,), attention_kinds=("full", "window"), max_long_rows=1)

    def memory(self):
        page = os.sysconf("SC_PAGE_SIZE")
        total, free = (os.sysconf(name) * page for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
        return MemoryReport(total=total, free=free, kv_limit=256 * 2**20)

    def runner_parts(self):
        return {}

    def synchronize(self):
        """Plain torch on the CPU is done when a call returns."""

    def close(self):
        """Nothing was opened."""
