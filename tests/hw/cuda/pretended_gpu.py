"""A GPU that is not there: the whole CUDA device runs, on tensors that say `cuda:0` and keep their numbers on the host.

    with pretended_gpu.use() as gpu:
        with Engine(model="tiny-chat", device="cuda", dtype="float32") as engine: ...
    assert not gpu.waits

So a host without a GPU finds what otherwise only a GPU shows: an op or a kernel that is given tensors of the host and of the GPU
together raises, and `waits` tells where the host waited for the GPU within a step: a value read, a size that depends on values, a
copy from or to memory that is not pinned. Kernels are interpreted, graphs emulated.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from graph_emulator import INDEXED, Emulator, why_it_waits
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from triton.runtime.interpreter import InterpretedFunction

GPU = torch.device("cuda", 0)
COPIES = ("aten::copy_", "aten::_to_copy")
HARMLESS = {"aten::lift_fresh"}  # of what a graph refuses
COMPILER = shutil.which("c++")
GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""


class GpuTensor(torch.Tensor):
    """`host`: the tensor that it stands for."""

    @staticmethod
    def __new__(cls, host):
        like = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype, "device": GPU}
        with torch.inference_mode(False):  # a view of one made before would have no version counter
            return torch.Tensor._make_wrapper_subclass(cls, host.size(), **like)

    def __init__(self, host):
        self.host = host

    def __repr__(self):
        return f"GpuTensor({self.host!r})"

    def data_ptr(self):
        return self.host.data_ptr()

    def untyped_storage(self):
        return self.host.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendedGpu.current.run(func, args, kwargs or {})


class PretendedGpu(TorchDispatchMode):
    """`steps` were submitted; `waits`: (what waited, where) within them; `graphs`: what records for each device."""

    current: PretendedGpu

    def __init__(self):
        super().__init__()
        self.steps, self.waits, self.graphs, self.in_step = 0, [], [], False

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        return self.run(func, args, kwargs or {})

    def run(self, func, args, kwargs):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu, to = [isinstance(x, GpuTensor) for x in tensors], kwargs.get("device")
        stays = any(on_gpu) if func._schema.name != "aten::copy_" else on_gpu[0]
        goes = stays if to is None else torch.device(to).type == "cuda"
        if goes or any(on_gpu):
            self._check(func, args, kwargs, tensors, on_gpu, goes)
        instead = {"device": "cpu"} if goes and to is not None else {}
        pinned = bool(kwargs.get("pin_memory"))
        instead |= {"pin_memory": False} if pinned else {}
        out = func(*tree_map(_inner, args), **(tree_map(_inner, kwargs) | instead))
        if pinned:
            out.is_pinned_here = True
        known = {id(_inner(x)): x for x in tensors}
        return tree_map(lambda x: _outer(x, known, goes) if isinstance(x, torch.Tensor) else x, out)

    def _check(self, func, args, kwargs, tensors, on_gpu, goes):
        name = func._schema.name
        hosts = [x for x, is_gpu in zip(tensors, on_gpu, strict=True) if not is_gpu]
        if name in COPIES:
            pinned = all(getattr(x, "is_pinned_here", False) for x in hosts)
            crosses = bool(hosts) or (not goes and name == "aten::_to_copy")
            returns_at_once = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if crosses and not (hosts and pinned and returns_at_once):
                self._wait(f"{name} between host and GPU, not from or to pinned memory or not non_blocking")
        elif hosts and name in INDEXED and isinstance(args[0], GpuTensor):
            self._wait(f"{name} by what is on the host")
        elif any(x.dim() for x in hosts):
            places = [(tuple(x.shape), x.device.type) for x in tensors]
            raise RuntimeError(f"{name} of tensors of the host and of the GPU: {places}")
        elif name not in HARMLESS and (reason := why_it_waits(func, args, kwargs)):
            self._wait(reason)

    def _wait(self, what):
        if self.in_step:
            frames = [f for f in traceback.extract_stack() if "/torch/" not in f.filename and f.filename != __file__]
            self.waits.append((what, " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:]))))

    def record(self, device):
        """In the place of a `Capture`."""
        self.graphs.append(Emulator())
        return self.graphs[-1]


def _inner(x):
    return x.host if isinstance(x, GpuTensor) else x


def _outer(x, known, goes):
    mine = known.get(id(x))
    return mine if mine is not None else GpuTensor(x) if goes else x


class Event:
    """What happens here has happened when it is asked for."""

    def __init__(self, *args, **options): ...

    def record(self, *args): ...

    def synchronize(self): ...

    def query(self):
        return True


@contextmanager
def use(capability=(8, 0)):
    """In this thread engines of the device "cuda" run on it, a GPU of that capability with 256 MiB."""
    _load_guard()
    gpu = PretendedGpu.current = PretendedGpu()
    with ExitStack() as stack:
        for name, value in _cuda(capability).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Event", Event))
        stack.enter_context(mock.patch.object(torch.Tensor, "pin_memory", _pinned))
        stack.enter_context(mock.patch.object(InterpretedFunction, "run", _launching(InterpretedFunction.run)))
        stack.enter_context(mock.patch("kernel_cuda.probe.why_not", lambda: None))
        stack.enter_context(mock.patch("kernel_cuda.device.Capture", gpu.record))
        stack.enter_context(mock.patch("kernel_core.nn.runner.Runner.submit", _submitting(gpu)))
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(gpu)
        yield gpu


def _cuda(capability):
    nothing, properties = lambda *args, **options: None, SimpleNamespace(multi_processor_count=1)
    does_nothing = ("_lazy_init", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")
    return dict.fromkeys(does_nothing, nothing) | {
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (256 << 20, 256 << 20),
        "memory_reserved": lambda device=None: 0,
        "max_memory_reserved": lambda device=None: 1 << 20,
        "Event": Event,
    }


def _pinned(tensor):
    copy = tensor.clone()
    copy.is_pinned_here = True
    return copy


def _submitting(gpu):
    from kernel_core.nn.runner import Runner

    submit = Runner.submit

    def submitted(self, plan):
        gpu.in_step, gpu.steps = True, gpu.steps + 1
        try:
            return submit(self, plan)
        finally:
            gpu.in_step = False

    return submitted


def _launching(run):
    def launch(kernel, *args, grid, warmup, **kwargs):
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor) and not isinstance(x, GpuTensor):
                raise ValueError(f"{kernel.fn.__name__} cannot read a tensor of the host, {tuple(x.shape)}")
        with _disable_current_modes():
            return run(kernel, *map(_inner, args), grid=grid, warmup=warmup, **{k: _inner(v) for k, v in kwargs.items()})

    return launch


def _load_guard():
    """A build of torch without CUDA has no guard for its devices: register one that does nothing."""
    if hasattr(_load_guard, "loaded"):
        return
    torch_root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(GUARD)
        places = [f"-I{torch_root}/include", f"-L{torch_root}/lib", "-lc10"]
        subprocess.run([COMPILER, "-std=c++20", "-shared", "-fPIC", str(source), *places, "-o", str(library)], check=True)
        _load_guard.loaded = ctypes.CDLL(str(library))
