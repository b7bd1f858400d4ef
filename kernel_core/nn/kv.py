"""The KV groups of a model and the KV storage of its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kernel_core.errors import CapacityError, ConfigError
from kernel_core.nn.protocols import AttentionBackend, AttentionBatch, AttentionSpec
from kernel_core.nn.transfer import Download, upload
from kernel_core.plan import Capabilities, Copies, KVGroup

Choose = Callable[[AttentionSpec], AttentionBackend]


class AttentionChoice:
    """Picks the backend of each layer: of those that support it the highest priority, the first offered among equals."""

    def __init__(self, backends: Sequence[AttentionBackend], dtype: torch.dtype, block_size: int) -> None:
        self.backends = sorted(backends, key=lambda b: -b.priority)
        self.dtype, self.block_size = dtype, block_size

    def __call__(self, spec: AttentionSpec) -> AttentionBackend:
        """Rate: build. Raises ConfigError when no backend supports the layer."""
        for backend in self.backends:
            if backend.supports(spec, self.dtype, self.block_size):
                return backend
        raise ConfigError(
            f"no attention backend supports layer {spec.layer} ({spec.kind}, {spec.algorithm}, head size {spec.head_dim}, "
            f"{self.dtype}, block size {self.block_size}); offered: {[b.name for b in self.backends]}"
        )


def attention_specs(module: nn.Module) -> list[AttentionSpec]:
    """The specs of a model's attention layers, in module order."""
    specs = [s for m in module.modules() if isinstance(s := getattr(m, "spec", None), AttentionSpec)]
    names = [spec.layer for spec in specs]
    if len(set(names)) != len(names):
        raise ConfigError(f"attention layers must have unique paths, got {sorted(n for n in names if names.count(n) > 1)}")
    return specs


def choose_block_size(asked: int | None, capabilities: Capabilities, max_model_len: int) -> int:
    """The configured block size, or the device's first choice; 0 there means one block a request."""
    sizes = [size or max_model_len for size in capabilities.block_sizes]
    if asked is None:
        return sizes[0]
    if asked not in sizes:
        raise ConfigError(f"engine.block_size = {asked}: this device has {sizes}")
    return asked


def kv_groups(specs: Sequence[AttentionSpec], choose: Choose, dtype: torch.dtype, block_size: int) -> tuple[KVGroup, ...]:
    """Layers of one (kind, window) form a group, in order of first appearance."""
    members: dict[tuple[str, int | None], list[AttentionSpec]] = {}
    for spec in specs:
        members.setdefault((spec.kind, spec.window), []).append(spec)
    return tuple(
        KVGroup(
            kind=kind,
            block_size=block_size,
            bytes_per_block=sum(choose(s).bytes_per_block(s, dtype, block_size) for s in layers),
            layers=tuple(s.layer for s in layers),
            window=window,
        )
        for (kind, window), layers in members.items()
    )


class Blocks:
    """Implements `BlockAccess` over the KV of all layers. Raises ConfigError when a backend does not show its blocks."""

    def __init__(self, store: KVStore) -> None:
        self.device = store.device
        self._tensors = [[t for layer in group.layers for t in store.blocks(layer, group)] for group in store.groups]
        self.bytes_per_block = [sum(t[0].nbytes for t in tensors) for tensors in self._tensors]
        shapes = [[(t.dtype, tuple(t.shape[1:])) for t in tensors] for tensors in self._tensors]
        names = [[(layer, store.backends[layer].name) for layer in group.layers] for group in store.groups]
        self.layout = repr((shapes, names))

    def read(self, group: int, ids: Sequence[int]) -> Download:
        index = upload(np.array(ids, np.int64), self.device)
        parts = [t[index].flatten(1).view(torch.uint8) for t in self._tensors[group]]
        return Download({"blocks": torch.cat(parts, 1)}, self.device)

    def write(self, group: int, ids: Sequence[int], data: Tensor) -> None:
        index = upload(np.array(ids, np.int64), self.device)
        parts = data.to(self.device, non_blocking=True).split([t[0].nbytes for t in self._tensors[group]], 1)
        for tensor, part in zip(self._tensors[group], parts, strict=True):
            tensor[index] = part.contiguous().view(tensor.dtype).view(len(ids), *tensor.shape[1:])


class KVStore:
    """KV of all layers: `kv[layer]`, opaque to all but the layer's backend."""

    def __init__(
        self,
        specs: Sequence[AttentionSpec],
        groups: Sequence[KVGroup],
        num_blocks: Sequence[int],
        choose: Choose,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.groups, self.device = tuple(groups), device
        self.specs = {spec.layer: spec for spec in specs}
        self.backends = {spec.layer: choose(spec) for spec in specs}
        self.kv: dict[str, Any] = {}
        self._shared: dict[frozenset[str], list[list[list[str]]]] = {}
        for group, blocks in zip(groups, num_blocks, strict=True):
            for layer in group.layers:
                self.kv[layer] = self._allocate(layer, dtype, group.block_size, blocks)

    def _allocate(self, layer: str, dtype: torch.dtype, block_size: int, blocks: int) -> Any:
        try:
            return self.backends[layer].allocate(self.specs[layer], dtype, block_size, blocks)
        except (RuntimeError, MemoryError) as error:
            raise CapacityError(
                f"cannot allocate {blocks} KV blocks of layer {layer}: {error}; lower engine.kv_memory"
            ) from error

    def plans(self, batches: Sequence[AttentionBatch | None], only: Set[str]) -> dict[str, Any]:
        """The attention plans of some layers, by layer; those of one group and backend share one. A batch per group, None
        where the group has none of these layers. Rate: step."""
        plans: dict[str, Any] = {}
        for members, batch in zip(self._members(frozenset(only)), batches, strict=True):
            for layers in members:
                assert batch is not None
                plan = self.backends[layers[0]].plan(batch, [self.specs[layer] for layer in layers])
                plans.update(dict.fromkeys(layers, plan))
        return plans

    def _members(self, only: frozenset[str]) -> list[list[list[str]]]:
        """Per group, these layers by backend."""
        if only not in self._shared:
            groups = []
            for group in self.groups:
                by_backend: dict[int, list[str]] = {}
                for layer in group.layers:
                    if layer in only:
                        by_backend.setdefault(id(self.backends[layer]), []).append(layer)
                groups.append(list(by_backend.values()))
            self._shared[only] = groups
        return self._shared[only]

    def blocks(self, layer: str, group: KVGroup) -> Sequence[Tensor]:
        """The tensors of one layer, by block. Raises ConfigError."""
        backend = self.backends[layer]
        if not hasattr(backend, "blocks"):
            raise ConfigError(f"KV blocks cannot leave the device: the attention backend {backend.name} does not show them")
        return backend.blocks(self.kv[layer], self.specs[layer], group.block_size)

    def copy(self, group: int, src: Tensor, dst: Tensor) -> None:
        """Copy single tokens (int64 [n] slots) in all layers of a group."""
        for layer in self.groups[group].layers:
            self.backends[layer].copy_kv(self.kv[layer], self.specs[layer], src, dst)

    def copy_planned(self, copies: Sequence[Copies]) -> None:
        """The copies of a plan, before its forward. Rate: step."""
        for number, item in enumerate(copies):
            if len(item.src):
                self.copy(number, upload(item.src, self.device), upload(item.dst, self.device))
