"""How many kernels and copies a step launches around the model, by what its requests ask for. Needs no GPU.

    PYTHONPATH=hw/cuda:tests/hw/cuda:tests/hw/shared python tests/hw/cuda/count_launches.py

The parts of the CUDA device run on the CPU, their kernels interpreted; ops of torch that make or change a tensor, launches of
kernels and transfers are counted from the plan of a step to its report. The model counts nothing: it is a graph, or as many
launches as it has.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections import Counter
from statistics import median
from unittest import mock

import torch
from emulated_device import FUSED
from graph_emulator import EMPTY
from kernel_cuda.kernels import pointwise
from kernel_cuda.ops import register_history
from kernel_cuda.sampling import FusedSampler
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from kernel_core import Engine
from kernel_core.nn import runner

DRAFTS = {"ngram": {"draft_tokens": 4, "adaptive": False}}
EAGLE = {"eagle": {"head": "tiny-chat-eagle3", "adaptive": False}}
DRAFT_MODEL = {"draft_model": {"model": "tiny-draft", "draft_tokens": 3, "adaptive": False}}
#: (what a request asks for, plugins)
KINDS = {
    "greedy": ({"temperature": 0}, {}),
    "top_p and top_k": ({"temperature": 0.8, "top_p": 0.9, "top_k": 40}, {}),
    "logprobs": ({"temperature": 0, "logprobs": 5}, {}),
    "penalties": ({"temperature": 0, "repetition_penalty": 1.2}, {}),
    "logit bias": ({"temperature": 0, "logit_bias": {5: 2.0}}, {}),
    "minimum and bad words": ({"temperature": 0, "min_tokens": 8, "bad_words": ["one", "two three"], "ignore_eos": False}, {}),
    "guided decoding": (
        {"temperature": 0, "structured_outputs": {"regex": "[a-z ]{60}"}, "ignore_eos": False},
        {"guided_decoding": {}},
    ),
    "n-gram drafts": ({"temperature": 0}, DRAFTS),
    "eagle3 drafts": ({"temperature": 0}, EAGLE),
    "draft model, random": ({"temperature": 0.9}, DRAFT_MODEL),
}


class Launches(TorchDispatchMode):
    """Counts what is launched within, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, out = func._schema.name, func(*args, **(kwargs or {}))
        views = {x.alias_info is not None and not x.alias_info.is_write for x in func._schema.returns}
        if name not in EMPTY and True not in views:
            self.counts[name] += 1
        return out


def counted(asked, plugins, fused):
    """The median of a steady run's steps, in launches, and what the last of them launched."""
    from kernel_cpu import ops
    from kernel_cpu.device import CpuDevice

    steps, mode, inside = [], [None], InterpretedFunction.run
    submit, from_numpy = runner.Runner.submit, torch.from_numpy

    def submitted(self, plan):
        with Launches() as mode[0]:
            pending = submit(self, plan)
        if pending.download is not None and (plan.start > 0).all():
            mode[0].counts["download"] += len(pending.download._tensors)
            steps.append(mode[0].counts)
        return pending

    def launched(kernel, *args, **kwargs):
        mode[0].counts[f"kernel {kernel.fn.__name__}"] += 1
        with _disable_current_modes():
            return inside(kernel, *args, **kwargs)

    def uploaded(array):
        mode[0].counts["upload"] += 1
        return from_numpy(array)

    def silent(module, *others):
        def run(*inputs):
            with _disable_current_modes():
                return module(*inputs)

        return run

    made = {"sampler": FusedSampler, "mask": lambda: pointwise.mask_bits, "graphs": silent, "steady": lambda runner: None}
    made |= FUSED if fused else {}
    with (
        mock.patch.object(CpuDevice, "runner_parts", lambda device: made),
        mock.patch.object(runner.Runner, "submit", submitted),
        mock.patch.object(InterpretedFunction, "run", launched),
        mock.patch.object(torch, "from_numpy", uploaded),
        mock.patch.object(ops, "register_history", register_history if fused else lambda offered: None),
        Engine(model="tiny-chat", device="cpu", max_model_len=128, max_requests=4, plugins=plugins) as engine,
    ):
        for number in range(2):
            params = engine.intake.params(**{"max_tokens": 12, "ignore_eos": True, **asked})
            engine.add_request(str(number), [1, 2, 3, 4] * 8, params)
        while engine.has_unfinished_requests():
            engine.step()
    return median(step.total() for step in steps), steps[-1]


def main():
    print(f"{'':24}{'parts of the runner':>22}{'fused_steps':>14}")
    for name, (asked, plugins) in KINDS.items():
        plain, _ = counted(asked, plugins, False)
        fused, _ = counted(asked, plugins, True)
        print(f"{name:24}{plain:22.0f}{fused:14.0f}")


if __name__ == "__main__":
    main()
