"""A device plugin and a feature plugin for the worker's tests; `made` remembers what they were given."""

from __future__ import annotations

import torch

from kernel_core.api import Capabilities, Manifest, hookimpl
from kernel_core.nn.api import MemoryReport

manifest = Manifest(name="toy", summary="a device for tests")
made: dict = {}


class Toy:
    name = "toy"
    torch_device = torch.device("cpu")

    def __init__(self, async_submit: bool):
        self.async_submit = async_submit
        self.closed = 0

    def capabilities(self) -> Capabilities:
        return Capabilities(dtypes=("float32",), block_sizes=(4, 8), async_submit=self.async_submit, tree_attention=False)

    def memory(self) -> MemoryReport:
        return MemoryReport(total=2**30, free=2**29)

    def runner_parts(self):
        return {}

    def synchronize(self): ...
    def close(self):
        self.closed += 1


class Plus:
    """Forbids the token 0, and breaks when told to."""

    stage, host, argmax_invariant, broken = "mask", False, False, False

    def opened(self, opened):
        return True

    def closed(self, slot): ...
    def fill(self, turn): ...
    def apply(self, logits, step):
        if self.broken:
            raise ZeroDivisionError("told to break")
        logits[:, 0] = float("-inf")
        return logits


@hookimpl
def make_device(context, rank, world_size):
    made["device"] = Toy(made.get("async", False))
    made["rank"] = (rank, world_size, context.part)
    return made["device"]


@hookimpl
def make_logits_transform(context):
    made["context"], made["transform"] = context, Plus()
    return [made["transform"]]


@hookimpl
def register_calls(context):
    return {"echo": lambda data: data + b"!", "job": lambda data: b""}


@hookimpl
def make_drafter(context):
    return made.get("drafter")
