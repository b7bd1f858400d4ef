"""The runner part "graphs": a small step is recorded as the list of kernel calls that it makes, and replayed in one call, so
that no Python runs between two ops while the memory waits. So are the small passes of a drafter's layers.

A step is recorded while it runs, on tensors that stay; all recordings share the memory of what lies between two kernels. It can
be replayed when the model did nothing but call kernels, make empty tensors, take views, and the few ops of torch in `REPEATED`;
one that computes anything else with torch is run as it is, always."""

from __future__ import annotations

import ctypes
import logging
import math
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kernel_core.nn.api import AttentionBatch, Forward
from kernel_cpu import build

MOST_TOKENS = 40  # with more, products take so long that Python between them does not count
MOST_RECORDINGS = 64
MOST_BYTES = 64 << 20  # of what lies between the kernels of a step; models of that size do not need this either
SIGHTINGS = 4  # steps of a shape before it is recorded
COLUMNS = 64  # of a recorded block table, at least
CHUNK = 4 << 20
REPEATED = frozenset({"aten::cat", "aten::add", "aten::mul"})  # pure, of the same shape whatever is in their inputs

logger = logging.getLogger("kernel_cpu")
Call = tuple[str, tuple[Any, ...]]  # a kernel's name and arguments
Shape = tuple[Any, ...]


class Arena:
    """Memory for tensors that live from one kernel to the next. It stays where it is, and every recording starts at its
    beginning: one runs at a time, and what it gives is copied."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self.start()

    def start(self) -> None:
        self._next, self._place, self.used = 0, CHUNK, 0

    def take(self, like: Tensor) -> Tensor:
        """An empty tensor of the same shape and dtype, contiguous."""
        size = max(-(-like.nbytes // 64) * 64, 64)
        self.used += size
        if size > CHUNK:
            return torch.empty_like(like, memory_format=torch.contiguous_format)
        if self._place + size > CHUNK:
            if self._next == len(self._chunks):
                self._chunks.append(torch.empty(CHUNK, dtype=torch.uint8))
            self._next, self._place = self._next + 1, 0
        place, self._place = self._place, self._place + size
        memory = self._chunks[self._next - 1][place : place + math.prod(like.shape) * like.element_size()]
        return memory.view(like.dtype).view(like.shape)


class Tape:
    """Stands in for the library: does what it is asked, and keeps it."""

    def __init__(self, kernels: Any, calls: list[Any]) -> None:
        self._kernels, self._calls = kernels, calls

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(self._kernels, name)

        def call(*arguments: Any) -> int:
            self._calls.append((name, arguments))
            return function(*arguments)

        return call


class Watch(TorchDispatchMode):
    """Puts new tensors into the arena, keeps the ops that are to be repeated, and names every one that is neither that nor a
    view."""

    def __init__(self, arena: Arena, calls: list[Any]) -> None:
        super().__init__()
        self._arena, self._calls = arena, calls
        self.kept: list[Tensor] = []
        self.foreign: set[str] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch would import its compiler, seconds of it, to tell it not to look here."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name == "aten::empty":
            return self._keep(out)
        if name in REPEATED:
            out = self._keep(out).copy_(out)
            self._calls.append(partial(_repeat, func, args, kwargs or {}, out))
        elif func._schema.is_mutable or not _is_view(out, args):
            self.foreign.add(name)
        return out

    def _keep(self, like: Tensor) -> Tensor:
        self.kept.append(self._arena.take(like))
        return self.kept[-1]


def _repeat(func: Any, args: Any, kwargs: Mapping[str, Any], out: Tensor) -> None:
    out.copy_(func(*args, **kwargs))


def _is_view(out: Any, args: Any) -> bool:
    """Every result lies in what was given. A number read from a tensor is none."""
    given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
    return all(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in given for x in tree_leaves(out))


class Recorded:
    """One step, or pass. `fits` says whether it may be replayed for these arguments, `run` does it."""

    def __init__(
        self, model: nn.Module, fwd: Forward, batches: Sequence[AttentionBatch], others: Sequence[Tensor], arena: Arena
    ) -> None:
        self._batches = [_own(batch) for batch in batches]
        own = {id(batch): mine for batch, mine in zip(batches, self._batches)}
        attention = {layer: own[id(batch)] for layer, batch in fwd.attention.items()}
        self._fwd = replace(fwd, token_ids=fwd.token_ids.clone(), positions=fwd.positions.clone(), attention=attention, taps={})
        self._others = [other.clone(memory_format=torch.contiguous_format) for other in others]
        self._load(fwd, batches, others)
        calls: list[Any] = []
        tape, watch = Tape(build.library(), calls), Watch(arena, calls)
        arena.start()
        with build.standing_in(tape), watch:
            self._results = model(self._fwd, *self._others)
        self._kept, self._kernels = watch.kept, build.library()
        names = {call[0] for call in calls if isinstance(call, tuple)}
        self.foreign = watch.foreign | {name for name in names if not hasattr(self._kernels, f"{name}_slots")}
        if arena.used > MOST_BYTES:
            self.foreign.add(f"{arena.used >> 20} MiB between its kernels")
        if not self.foreign:
            self._parts = list(_parts(self._kernels, calls))

    def fits(self, batches: Sequence[AttentionBatch]) -> bool:
        """Is there room for the block tables?"""
        return all(b.block_table.shape[1] <= mine.block_table.shape[1] for b, mine in zip(batches, self._batches))

    def run(self, fwd: Forward, batches: Sequence[AttentionBatch], others: Sequence[Tensor]) -> Any:
        self._load(fwd, batches, others)
        for part in self._parts:
            part()
        return self.results(fwd)

    def results(self, fwd: Forward) -> Any:
        """Copies of what the model gave, its taps put into `fwd`."""
        fwd.taps.update({name: state.clone() for name, state in self._fwd.taps.items()})
        return tree_map(torch.clone, self._results)

    def _load(self, fwd: Forward, batches: Sequence[AttentionBatch], others: Sequence[Tensor]) -> None:
        self._fwd.token_ids.copy_(fwd.token_ids)
        self._fwd.positions.copy_(fwd.positions)
        for other, mine in zip(others, self._others):
            mine.copy_(other)
        for batch, mine in zip(batches, self._batches):
            for name in ("q_start", "kv_len", "slot_mapping", "tree", "positions"):
                given = getattr(batch, name)
                if given is not None:
                    getattr(mine, name).copy_(given)
            mine.block_table[:, : batch.block_table.shape[1]].copy_(batch.block_table)


def _own(batch: AttentionBatch) -> AttentionBatch:
    rows, columns = batch.block_table.shape
    table = batch.block_table.new_zeros(rows, max(COLUMNS, 1 << (columns - 1).bit_length()))
    names = ("q_start", "kv_len", "slot_mapping", "tree", "positions")
    mine = {name: None if (x := getattr(batch, name)) is None else x.contiguous().clone() for name in names}
    bounds = {"max_q": len(batch.slot_mapping), "max_kv": table.shape[1] * batch.block_size}
    return replace(batch, block_table=table, fresh=False, **mine, **bounds)


def _parts(kernels: Any, calls: Sequence[Any]) -> Iterator[Callable[[], None]]:
    """What a replay does: calls of kernels, as many at once as follow each other, and ops of torch."""
    first = 1
    for is_kernel, group in groupby(calls, lambda call: isinstance(call, tuple)):
        if is_kernel:
            some = list(group)
            yield partial(_replay, kernels, *_assemble(kernels, some), first)
            first += len(some)
        else:
            yield from group


def _replay(kernels: Any, steps: Any, slots: Sequence[Any], first: int) -> None:
    refused = kernels.kc_replay(ctypes.addressof(steps), len(slots))
    if refused:
        raise IndexError(f"call {first + refused - 1} of a recorded step refused its slots, positions or blocks")


def _assemble(kernels: Any, calls: Sequence[Call]) -> tuple[Any, list[Any]]:
    """→ (the steps of kc_replay, the slots that they point to)."""
    slots = [(ctypes.c_int64 * len(arguments))(*map(_slot, build.SIGNATURES[name], arguments)) for name, arguments in calls]
    words = []
    for (name, _), place in zip(calls, slots):
        words += [ctypes.cast(getattr(kernels, f"{name}_slots"), ctypes.c_void_p).value, ctypes.addressof(place)]
    return (ctypes.c_void_p * len(words))(*words), slots


def _slot(kind: str, value: Any) -> int:
    return struct.unpack("<i", struct.pack("<f", value))[0] if kind == "f" else int(value or 0)


Entry = tuple[Mapping[str, Any], str, Any]  # (where, name, what was there)


def _contents(model: nn.Module) -> Iterator[Entry]:
    """What modules hold: children, parameters, buffers, and what ops made of the weights."""
    for module in model.modules():
        for mapping in (module._modules, module._parameters, module._buffers):
            yield from _entries(mapping)
        if "_state" in vars(module):
            yield vars(module), "_state", vars(module)["_state"]


def _entries(mapping: Mapping[str, Any]) -> list[Entry]:
    return [(mapping, name, value) for name, value in mapping.items()]


def _hooks(model: nn.Module) -> list[Mapping[int, Any]]:
    return [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]


class Replay:
    """Callable as the model is. `also`: other modules whose weights it reads."""

    def __init__(self, model: nn.Module, *also: nn.Module) -> None:
        self.model, self._modules = model, (model, *also)
        self.recorded: dict[Shape, Recorded] = {}
        self._arena = Arena()
        self._same: list[Entry] = []
        self._hooks: list[Mapping[int, Any]] = []
        self._seen: Counter[Shape] = Counter()
        self._impossible: set[Shape] = set()

    def __call__(self, fwd: Forward, *others: Tensor) -> Any:
        batches = _batches(fwd)
        if batches is None or any(self._hooks):
            return self.model(fwd, *others)
        shape = _shape(fwd, batches, others)
        found = self.recorded.get(shape)
        if found is not None and self._unchanged() and found.fits(batches):
            return found.run(fwd, batches, others)
        self._seen[shape] += 1
        if self._seen[shape] < SIGHTINGS or shape[0] in self._impossible:
            return self.model(fwd, *others)
        return self._record(fwd, batches, others, shape)

    def _unchanged(self) -> bool:
        """Is everything still what it was, weights and KV included?"""
        if all(mapping.get(name) is value for mapping, name, value in self._same):
            return True
        self.recorded.clear()
        return False

    def _record(self, fwd: Forward, batches: Sequence[AttentionBatch], others: Sequence[Tensor], shape: Shape) -> Any:
        self._hooks = [hooks for module in self._modules for hooks in _hooks(module)]
        if any(self._hooks):
            return self.model(fwd, *others)
        made = Recorded(self.model, fwd, batches, others, self._arena)
        if made.foreign:
            self._impossible.add(shape[0])
            logger.debug("steps like %s are not replayed, the model computes with %s", shape[0], ", ".join(sorted(made.foreign)))
        else:
            if not self.recorded:
                self._same = [entry for module in self._modules for entry in _contents(module)] + _entries(fwd.kv)
            self.recorded.pop(shape, None)
            if len(self.recorded) == MOST_RECORDINGS:
                del self.recorded[next(iter(self.recorded))]
            self.recorded[shape] = made
        return made.results(fwd)


def _batches(fwd: Forward) -> list[AttentionBatch] | None:
    """The attention inputs of a step that can be replayed, one a group."""
    tokens = len(fwd.token_ids)
    if not 0 < tokens <= MOST_TOKENS or fwd.inputs or fwd.embeds is not None or fwd.positions.dim() != 1:
        return None
    batches = list({id(batch): batch for batch in fwd.attention.values()}.values())
    return batches if all(isinstance(b, AttentionBatch) and len(b.slot_mapping) == tokens for b in batches) else None


def _shape(fwd: Forward, batches: Sequence[AttentionBatch], others: Sequence[Tensor]) -> Shape:
    """What recordings differ in; the first part is the kind of the step."""
    kind = (
        fwd.tapped,
        any(b.tree is not None for b in batches),
        len(fwd.token_ids) == len(batches[0].kv_len) if batches else True,
    )
    rows = tuple((len(b.kv_len), None if b.tree is None else b.tree.shape[1], b.positions is None) for b in batches)
    return kind, len(fwd.token_ids), rows, tuple((x.shape, x.dtype) for x in others)
