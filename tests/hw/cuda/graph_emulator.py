"""A CUDA graph on the CPU: what a function did once is done again, with the same tensors and the same numbers.

While it records, every op of torch and every launch of an interpreted kernel goes onto a tape with the very tensors and numbers
that it got. A replay repeats the tape: results are copied to where the recording had them, so that whoever holds such a tensor
sees new values, and what the function read from Python stays as it was. As with a real capture

- the function runs once before, and what it does while it is recorded changes nothing outside and gives no values yet;
- what reads a value on the host, or copies pageable memory to the device, is refused with a RuntimeError;
- tensors of a graph hold junk until a replay fills them.
"""

from __future__ import annotations

from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from triton.runtime.interpreter import InterpretedFunction

WAITS = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select", "_unique2"),
        *("unique_dim", "unique_consecutive", "bincount", "histc", "lift_fresh", "_pin_memory", "resize_", "set_"),
    )
}
HOST = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.pin_memory, torch.tensor}
HOST |= {torch.as_tensor, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__array__}
INDEXED = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
EMPTY = ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")
JUNK = {torch.bool: True, torch.uint8: 0x5A, torch.int8: 0x5A, torch.int32: 0x5A5A5A5A, torch.int64: 0x5A5A5A5A5A5A}


class Refused(RuntimeError):
    """What a capture refuses."""


class Emulator:
    """In the place of `kernel_cuda.capture.Capture`. `graphs` were recorded, `replays` made."""

    def __init__(self):
        self.graphs, self.replays = 0, 0

    def __call__(self, function):
        function()
        tape = Tape()
        results = tape.record(function)
        self.graphs += 1

        def replay():
            self.replays += 1
            tape.replay()

        return replay, results


class Tape:
    def __init__(self):
        self._entries = []
        self._fresh = {}  # storages that were made while recording, by address
        self._before = {}  # bytes of others, before anything was written there

    def record(self, function):
        run, tape = InterpretedFunction.run, self

        def launch(kernel, *args, grid, warmup, **kwargs):
            if warmup:
                return
            sizes = grid(kwargs) if callable(grid) else grid
            tape.keep((args, kwargs))
            again = lambda: run(kernel, *args, grid=sizes, warmup=False, **kwargs)  # noqa: E731
            tape.add(again)
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                again()

        def refuse(*args, **kwargs):
            raise Refused("torch.from_numpy: pageable memory cannot be copied while a graph is captured")

        kernels, pageable = mock.patch.object(InterpretedFunction, "run", launch), mock.patch.object(torch, "from_numpy", refuse)
        with kernels, pageable, _Refusals(), _Recording(self):
            results = function()
        for storage, bytes_ in self._before.values():
            _bytes(storage).copy_(bytes_)
        self._junk()
        return results

    @torch.inference_mode()
    def replay(self):
        self._junk()
        for entry in self._entries:
            entry()

    def add(self, entry):
        self._entries.append(entry)

    def keep(self, tensors):
        """The bytes of storages from outside, before an op that may write there."""
        with _disable_current_modes():
            for x in tree_leaves(tensors):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    if storage.data_ptr() not in self._fresh and storage.data_ptr() not in self._before and storage.nbytes():
                        self._before[storage.data_ptr()] = storage, _bytes(storage).clone()

    def made(self, tensor):
        self._fresh[tensor.untyped_storage().data_ptr()] = tensor

    def _junk(self):
        with torch.inference_mode():
            for tensor in self._fresh.values():
                tensor.fill_(JUNK.get(tensor.dtype, float("nan")))


def _bytes(storage):
    return torch.empty(0, dtype=torch.uint8).set_(storage)


class _Refusals(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in HOST:
            raise Refused(f"{func.__name__}: the host would wait for the device")
        return func(*args, **(kwargs or {}))


class _Recording(TorchDispatchMode):
    def __init__(self, tape):
        super().__init__()
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func._schema.name
        if reason := why_it_waits(func, args, kwargs):
            raise Refused(reason)
        if func._schema.is_mutable:
            self.tape.keep((args, kwargs))
        out = func(*args, **kwargs)
        leaves, _ = tree_flatten(out)
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        fresh = [isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given for x in leaves]
        flat, arguments = tree_flatten((args, kwargs))  # lists among them may change later

        def again():
            new_args, new_kwargs = tree_unflatten(flat, arguments)
            for is_fresh, kept, new in zip(fresh, leaves, tree_leaves(func(*new_args, **new_kwargs)), strict=True):
                if is_fresh:
                    kept.copy_(new)

        for is_fresh, tensor in zip(fresh, leaves, strict=True):
            if is_fresh:
                self.tape.made(tensor)
        if name not in EMPTY and (func._schema.is_mutable or any(fresh)):
            self.tape.add(again)
        return out


def why_it_waits(func, args, kwargs):
    """What of an op makes the host wait for a device, or None. Ops that copy between both are not looked at."""
    name = func._schema.name
    if name in WAITS:
        return f"{name} makes the host wait, or copies pageable memory"
    if name in INDEXED and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
        return f"{name} by a mask makes the host wait"
    counts = func._overloadname in ("Tensor", "self_Tensor")
    if name == "aten::repeat_interleave" and counts and kwargs.get("output_size") is None:
        return f"{name} without output_size makes the host wait"
    return None
