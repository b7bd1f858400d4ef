"""From a family and a checkpoint to a model that is ready to run.

Order: the modules on the meta device → weight formats replace linears → wrappers wrap → weights stream in, each checkpoint
tensor to its part → `finish()` of every module. A live update is the same stream and `finish()` again."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kernel_core.discovery import load_value
from kernel_core.errors import ConfigError, PluginError
from kernel_core.manifest import ModelFamily
from kernel_core.nn.protocols import ModelContext
from kernel_core.registry import Registry

RANDOM_STD = 0.02
TIED = ("embed_tokens.weight", "lm_head.weight")  # a tied model keeps one tensor, in its head


@dataclass(frozen=True, slots=True)
class WeightMap:
    """A family's name map, as data: used by loading, adapters, quantisation and live updates alike.

    rename: (pattern, replacement) applied in order to every checkpoint name. split: a checkpoint tensor that holds several
    parts, by the last component of its module path. ignore: patterns of names that are not needed."""

    rename: Sequence[tuple[str, str]] = (("^model\\.", ""),)
    split: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ignore: Sequence[str] = ("rotary_emb\\.inv_freq$",)

    def __call__(self, name: str) -> str | None:
        """The name in our model, None when it is not needed."""
        if any(re.search(pattern, name) for pattern in self.ignore):
            return None
        for pattern, replacement in self.rename:
            name = re.sub(pattern, replacement, name)
        return name


def build_model(family: ModelFamily, ctx: ModelContext, registry: Registry) -> nn.Module:
    """Build and load. Raises ConfigError for a checkpoint that does not fit, PluginError for a broken plugin."""
    with torch.device("meta"):
        model = load_value(family.build)(ctx)
    names = load_value(family.weights)
    _replace(model, registry)
    loader = WeightLoader(model, names)
    if ctx.config.engine.random_weights:
        loader.fill_randomly(seed=ctx.config.engine.seed or 0)
    else:
        loader.load(_tensors(ctx, registry))
    model.eval()
    return model


def _tensors(ctx: ModelContext, registry: Registry) -> Iterable[tuple[str, Tensor]]:
    for _, checkpoint in registry.call("make_checkpoint"):
        if checkpoint.format == ctx.info.format:
            return checkpoint.tensors(ctx.info.path)
    raise PluginError(f"no enabled plugin reads checkpoints of the format {ctx.info.format!r}")


def _replace(model: nn.Module, registry: Registry) -> None:
    """Weight formats, then wrappers, in resolved order; parents come before children."""
    formats = [answer for _, answer in registry.call("make_weight_format")]
    for path, module in list(model.named_modules()):
        if not hasattr(module, "slices"):
            continue
        for weight_format in formats:
            module = weight_format.replace(path, module) or module
        set_module(model, path, module)
        for _, wrapped in registry.call("wrap_module", path=path, module=module):
            set_module(model, path, wrapped)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class WeightLoader:
    """Where each checkpoint tensor goes. Built once per model; `load` may run again for a live update."""

    def __init__(self, model: nn.Module, names: WeightMap) -> None:
        self.model, self.names = model, names
        self.targets: dict[str, tuple[nn.Module, str, str]] = {}
        for path, module in model.named_modules():
            self._collect(path, module)

    def _collect(self, path: str, module: nn.Module) -> None:
        if hasattr(module, "slices"):
            prefix = path.rpartition(".")[0]
            kinds = ("weight", "bias") if module.bias is not None else ("weight",)
            for part in module.slices:
                for kind in kinds:
                    self.targets[f"{prefix}.{part}.{kind}".lstrip(".")] = (module, part, kind)
        elif hasattr(module, "part_names"):
            for part in module.part_names():
                self.targets[f"{path}.{part}.weight"] = (module, part, "weight")
        elif hasattr(module, "load"):
            for kind in module.shapes:
                self.targets[f"{path}.{kind}"] = (module, path.rpartition(".")[2], kind)

    def load(self, tensors: Iterable[tuple[str, Tensor]], progress: bool | None = None) -> None:
        """Stream all tensors in; raises ConfigError naming what is missing or left over."""
        missing, unexpected = set(self.targets), []
        for name, tensor in _shown(tensors, progress):
            own = self.names(name)
            if own == TIED[0] and own not in self.targets:
                own = TIED[1]
            for part, piece in self._pieces(own, tensor):
                target = self.targets.get(part)
                if target is None:
                    unexpected.append(name)
                else:
                    target[0].load(target[1], target[2], piece)
                    missing.discard(part)
        if missing or unexpected:
            raise ConfigError(
                f"the checkpoint does not fit the model: missing {_some(missing)}; unexpected {_some(unexpected)}"
            )
        self.finish()

    def _pieces(self, name: str | None, tensor: Tensor) -> Iterable[tuple[str, Tensor]]:
        if name is None:
            return
        prefix, _, kind = name.rpartition(".")
        parent, _, last = prefix.rpartition(".")
        parts = self.names.split.get(last)
        if parts is None:
            yield name, tensor
            return
        full = [f"{parent}.{part}.{kind}" for part in parts]
        module = self.targets[full[0]][0]
        sizes = {p.name: p.size for p in module.parts}
        yield from zip(full, tensor.split([sizes[part] for part in parts]))

    def fill_randomly(self, seed: int) -> None:
        """Seeded normal weights, ones for norms: for benchmarks."""
        generator = torch.Generator().manual_seed(seed)
        for name, (module, part, kind) in self.targets.items():
            shape = _shape(module, part, kind)
            if len(shape) == 1:
                value = torch.zeros(shape) if kind == "bias" or getattr(module, "offset", 0) else torch.ones(shape)
            else:
                value = torch.empty(shape).normal_(0, RANDOM_STD, generator=generator)
            module.load(part, kind, value.to(module.ctx.dtype))
        self.finish()

    def finish(self) -> None:
        for module in self.model.modules():
            if module is not self.model and hasattr(module, "finish"):
                module.finish()
        if hasattr(self.model, "finish"):
            self.model.finish()


def _shape(module: Any, part: str, kind: str) -> tuple[int, ...]:
    if hasattr(module, "slices"):
        size = {p.name: p.size for p in module.parts}[part]
        return (size, module.in_features) if kind == "weight" else (size,)
    if hasattr(module, "part_names"):
        width = (module.hidden, module.intermediate)
        return width if part.endswith("down_proj") else width[::-1]
    return module.shapes[kind]


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return (", ".join(ordered[:5]) + more) or "nothing"


def _shown(tensors: Iterable[tuple[str, Tensor]], progress: bool | None) -> Iterable[tuple[str, Tensor]]:
    """With a count of bytes on a terminal."""
    if not (sys.stderr.isatty() if progress is None else progress):
        yield from tensors
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = TextColumn("loading weights"), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        for name, tensor in tensors:
            yield name, tensor
            bar.advance(task, tensor.nbytes)
