"""The runner part "graphs": a decode step of few rows is recorded as the list of kernel calls that it makes, and replayed in one
call, so that no Python runs between two ops while the memory waits.

A step is recorded while it runs, on tensors that stay. It can be replayed when the model did nothing but call kernels, make empty
tensors and take views; one that computes anything with torch is run as it is, always."""

from __future__ import annotations

import ctypes
import logging
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernel_core.nn.api import AttentionBatch, Forward
from kernel_cpu import build

MOST_ROWS = 8  # with more, products take so long that Python between them does not count, and the tensors that stay grow
SIGHTINGS = 4  # steps with a number of rows before it is recorded
COLUMNS = 64  # of a recorded block table, at least

logger = logging.getLogger("kernel_cpu")


class Tape:
    """Stands in for the library: does what it is asked, and keeps it."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(self._kernels, name)

        def call(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            return function(*arguments)

        return call


class Watch(TorchDispatchMode):
    """Keeps the empty tensors that are made, and names every op that is neither that nor a view."""

    def __init__(self) -> None:
        super().__init__()
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
            self.kept.append(out)
        elif func._schema.is_mutable or not _is_view(out, args):
            self.foreign.add(name)
        return out


def _is_view(out: Any, args: Any) -> bool:
    """Every result lies in what was given. A number read from a tensor is none."""
    given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
    return all(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in given for x in tree_leaves(out))


class Recorded:
    """One step. `fits` says whether it may be replayed for these arguments, `run` does it."""

    def __init__(self, model: nn.Module, fwd: Forward, batches: Sequence[AttentionBatch]) -> None:
        self._batches = [_own(batch) for batch in batches]
        own = {id(batch): mine for batch, mine in zip(batches, self._batches)}
        attention = {layer: own[id(batch)] for layer, batch in fwd.attention.items()}
        self._fwd = replace(fwd, token_ids=fwd.token_ids.clone(), positions=fwd.positions.clone(), attention=attention, taps={})
        self._load(fwd, batches)
        tape, watch = Tape(build.library()), Watch()
        with build.standing_in(tape), watch:
            self.hidden: Tensor = model(self._fwd)
        fwd.taps.update(self._fwd.taps)
        self.foreign = watch.foreign | ({"taps"} if self._fwd.taps else set())
        self._kept, self._same, self._hooks = watch.kept, [*_contents(model), *_entries(fwd.kv)], _hooks(model)
        self._kernels = build.library()
        self.foreign |= {name for name, _ in tape.calls if not hasattr(self._kernels, f"{name}_slots")}
        if not self.foreign:
            self._steps, self._slots = _assemble(self._kernels, tape.calls)

    def fits(self, batches: Sequence[AttentionBatch]) -> bool:
        """Is everything still what it was, weights and KV included, and is there room for the block tables?"""
        return (
            all(mapping.get(name) is value for mapping, name, value in self._same)
            and not any(self._hooks)
            and all(b.block_table.shape[1] <= mine.block_table.shape[1] for b, mine in zip(batches, self._batches))
        )

    def run(self, fwd: Forward, batches: Sequence[AttentionBatch]) -> Tensor:
        self._load(fwd, batches)
        refused = self._kernels.kc_replay(ctypes.addressof(self._steps), len(self._slots))
        if refused:
            raise IndexError(f"call {refused} of a recorded step refused its slots, positions or blocks")
        return self.hidden

    def _load(self, fwd: Forward, batches: Sequence[AttentionBatch]) -> None:
        self._fwd.token_ids.copy_(fwd.token_ids)
        self._fwd.positions.copy_(fwd.positions)
        for batch, mine in zip(batches, self._batches):
            mine.kv_len.copy_(batch.kv_len)
            mine.slot_mapping.copy_(batch.slot_mapping)
            mine.block_table[:, : batch.block_table.shape[1]].copy_(batch.block_table)


def _own(batch: AttentionBatch) -> AttentionBatch:
    rows, columns = batch.block_table.shape
    table = batch.block_table.new_zeros(rows, max(COLUMNS, 1 << (columns - 1).bit_length()))
    q_start, kv_len, slots = batch.q_start.clone(), batch.kv_len.clone(), batch.slot_mapping.clone()
    return replace(batch, q_start=q_start, kv_len=kv_len, slot_mapping=slots, block_table=table)


def _assemble(kernels: Any, calls: Sequence[tuple[str, tuple[Any, ...]]]) -> tuple[Any, list[Any]]:
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
    """Callable as the model is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.recorded: dict[int, Recorded] = {}
        self._seen: Counter[int] = Counter()
        self._possible = True

    def __call__(self, fwd: Forward) -> Tensor:
        batches = self._batches(fwd) if self._possible else None
        if batches is None:
            return self.model(fwd)
        rows = len(fwd.token_ids)
        found = self.recorded.get(rows)
        if found is not None and found.fits(batches):
            return found.run(fwd, batches)
        self._seen[rows] += 1
        if self._seen[rows] < SIGHTINGS or any(_hooks(self.model)):
            return self.model(fwd)
        return self._record(fwd, batches, rows)

    def _record(self, fwd: Forward, batches: Sequence[AttentionBatch], rows: int) -> Tensor:
        made = Recorded(self.model, fwd, batches)
        if made.foreign:
            self._possible = False
            logger.debug("steps are not replayed, the model computes with %s", ", ".join(sorted(made.foreign)))
        else:
            self.recorded[rows] = made
        return made.hidden

    def _batches(self, fwd: Forward) -> list[AttentionBatch] | None:
        """The attention inputs of a step that can be replayed, one a group: all rows have a single token."""
        tokens = len(fwd.token_ids)
        if not 0 < tokens <= MOST_ROWS or fwd.inputs or fwd.tapped or fwd.embeds is not None or fwd.positions.dim() != 1:
            return None
        batches = list({id(batch): batch for batch in fwd.attention.values()}.values())
        fine = all(isinstance(b, AttentionBatch) and len(b.kv_len) == tokens and b.tree is b.positions is None for b in batches)
        return batches if fine else None
