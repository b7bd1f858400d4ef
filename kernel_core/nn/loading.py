"""From a family and a checkpoint to a model that is ready to run.

Modules are built on the meta device; weight formats replace parameters and wrappers wrap, in resolved order; then the
checkpoint's tensors stream in, each to its part, and a layer is finished as soon as it is whole, so that no more than one
layer exists twice while its weights are laid out. A live update is the same stream again: `model.loader.load(tensors)`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Set
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from kernel_core.discovery import load_value
from kernel_core.errors import ConfigError, PluginError
from kernel_core.manifest import ModelFamily
from kernel_core.nn.layers import UnknownPart
from kernel_core.nn.protocols import ModelContext, Weights

if TYPE_CHECKING:
    from rich.progress import Progress

SHOWN = 8  # names listed in a message
RANDOM_STD = 0.02
REST = "**"


class Hooks(Protocol):
    """The worker's hooks, each plugin's with its own context."""

    def call(self, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        """(plugin, answer) of every plugin that answers, in resolved order."""
        ...

    def chain(self, hook: str) -> list[Callable[..., Any]]:
        """Every plugin's implementation, in resolved order, for threading a value through."""
        ...


def build_model(family: ModelFamily, ctx: ModelContext, hooks: Hooks) -> nn.Module:
    """Build, load and finish. Rate: build. Raises ConfigError when the checkpoint does not fit the model, PluginError when no
    enabled plugin reads its format."""
    model = load_value(family.build)(ctx)
    _apply_formats(model, hooks)
    model.loader = WeightLoader(model, NameMap(load_value(family.weights)))
    model.loader.wrappers = _apply_wrappers(model, hooks)
    if ctx.config.engine.random_weights:
        model.loader.randomise(ctx.device)
    else:
        model.loader.load(_tensors(ctx, hooks))
    return model.eval()


def _tensors(ctx: ModelContext, hooks: Hooks) -> Weights:
    formats = {made.format: made for _, made in hooks.call("make_checkpoint")}
    if ctx.info.format not in formats:
        raise PluginError(f"no enabled plugin reads {ctx.info.format!r} checkpoints; enabled formats: {sorted(formats)}")
    return formats[ctx.info.format].tensors(ctx.info.path)


# ---- hooks


def parallel_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, layer) of everything that weight formats and wrappers see: what states `parts` and `shard`."""
    return [(path, m) for path, m in model.named_modules() if hasattr(m, "parts") and hasattr(m, "shard")]


def _apply_formats(model: nn.Module, hooks: Hooks) -> None:
    formats = [made for _, made in hooks.call("make_weight_format")]
    for path, layer in parallel_layers(model) if formats else ():
        replaced = next((new for f in formats if (new := f.replace(path, layer)) is not None), None)
        if replaced is not None:
            model.set_submodule(path, replaced)


def _apply_wrappers(model: nn.Module, hooks: Hooks) -> list[nn.Module]:
    """Each plugin sees what the one before it made."""
    wrappers, wraps = [], hooks.chain("wrap_module")
    for path, layer in parallel_layers(model) if wraps else ():
        for wrap in wraps:
            wrapper = wrap(path=path, module=layer)
            if wrapper is not None:
                model.set_submodule(path, wrapper)
                wrappers.append(wrapper)
                layer = wrapper
    return wrappers


# ---- names


class NameMap:
    """A family's name map: checkpoint name → "module.path" or "module.path:part"; None: the tensor is not needed.

    "*" stands for a number, in order on both sides. A key names a module's tensors by what comes before their last word,
    which then ends the part ("...q_proj" → "qkv:q" sends "...q_proj.weight" to the part "q.weight"), or one tensor in
    full. The key "**" takes every other name, whole, as the part."""

    def __init__(self, entries: Mapping[str, str | None]) -> None:
        self.entries = dict(entries)

    def find(self, name: str) -> tuple[str, str] | None:
        """(module path, part), or None when the tensor is not needed. Raises LookupError for an unknown name."""
        words = name.split(".")
        pattern = ["*" if word.isdigit() else word for word in words]
        numbers = [word for word in words if word.isdigit()]
        for end, kind in ((None, ""), (-1, words[-1])):
            key = ".".join(pattern[:end])
            if key in self.entries:
                return _target(self.entries[key], numbers, kind)
        if REST in self.entries:
            return self.entries[REST], name
        raise LookupError(name)


def _target(target: str | None, numbers: list[str], kind: str) -> tuple[str, str] | None:
    if target is None:
        return None
    for number in numbers:
        target = target.replace("*", number, 1)
    path, _, part = target.partition(":")
    return path, ".".join(word for word in (part, kind) if word)


# ---- weights


class WeightLoader:
    """Streams tensors into a model's layers. Keeps the layers it knew before they were wrapped."""

    def __init__(self, model: nn.Module, names: NameMap) -> None:
        self.names, self.wrappers, self.complete = names, [], False
        self.layers = {path: m for path, m in model.named_modules() if callable(getattr(m, "finish", None))}
        self.bytes = sum(p.numel() * p.itemsize for p in model.parameters())

    def load(self, tensors: Weights) -> None:
        """Load every tensor and finish every layer. The first time all parts must come; later, in a live update, whole
        layers may be left out. Rate: build, update. Raises ConfigError listing what is missing or not expected."""
        missing = {path: set(_expected(layer)) for path, layer in self.layers.items()}
        own = {path for path, parts in missing.items() if not parts}
        unexpected: list[str] = []
        with _Bar(self.bytes) as bar:
            for name, tensor in tensors:
                path = self._place(name, tensor, missing, unexpected)
                bar(tensor.nbytes)
                if path is not None and not missing[path] and path not in own:
                    self.layers[path].finish()
        left_out = {path for path, parts in missing.items() if self.complete and parts == _expected(self.layers[path])}
        absent = [f"{path} ({part})" for path, parts in missing.items() if path not in left_out for part in sorted(parts)]
        if absent or unexpected:
            raise ConfigError(_mismatch(absent, unexpected))
        self.complete = True
        self._finish(own)

    def _place(self, name: str, tensor: Tensor, missing: dict[str, set[str]], unexpected: list[str]) -> str | None:
        """Give a tensor to its layer; the layer's path, None when it went nowhere."""
        try:
            found = self.names.find(name)
            if found is None:
                return None
            path, part = found
            filled = self.layers[path].load(part, tensor)
        except (LookupError, UnknownPart):
            unexpected.append(name)
            return None
        except ConfigError as error:
            raise ConfigError(f"the checkpoint's tensor {name!r} does not fit: {error}") from error
        missing[path].difference_update([part] if filled is None else filled)
        return path

    def _finish(self, paths: set[str]) -> None:
        """What waits for others: layers without tensors of their own, then the wrappers."""
        for path, layer in self.layers.items():
            if path in paths:
                layer.finish()
        for wrapper in self.wrappers:
            if callable(getattr(wrapper, "finish", None)):
                wrapper.finish()

    def randomise(self, device: torch.device, seed: int = 0) -> None:
        """Fill everything with seeded random numbers: vectors named weight with ones, the rest normal. Reads nothing."""
        generator = torch.Generator(device).manual_seed(seed)
        for layer in self.layers.values():
            if hasattr(layer, "randomise"):
                layer.randomise(generator)
                continue
            for name, parameter in list(layer.named_parameters(recurse=False)):
                value = torch.empty_like(parameter, device=device)
                ones = name == "weight" and value.dim() == 1
                value = value.fill_(1) if ones else value.normal_(0, RANDOM_STD, generator=generator)
                setattr(layer, name, nn.Parameter(value, requires_grad=False))
            if _expected(layer):
                layer.finish()
        self.complete = True
        self._finish({path for path, layer in self.layers.items() if not _expected(layer)})


def _expected(layer: nn.Module) -> Set[str]:
    """The parts that a layer needs; a replaced one may not say."""
    return getattr(layer, "expected", frozenset())


def _mismatch(missing: list[str], unexpected: list[str]) -> str:
    def some(names: list[str]) -> str:
        return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")

    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing: {some(missing)}")
    if unexpected:
        parts.append(f"{len(unexpected)} are not part of the model: {some(unexpected)}")
    return f"the checkpoint does not fit its config.json: {'; '.join(parts)}"


class _Bar:
    """A bar of bytes on a terminal; calls with a number of bytes advance it."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.bar: Progress | None = None

    def __enter__(self) -> Callable[[int], None]:
        if not sys.stderr.isatty():
            return lambda size: None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

        columns = TextColumn("loading weights"), BarColumn(), DownloadColumn(binary_units=True), TimeElapsedColumn()
        self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self.bar.start()
        task = self.bar.add_task("", total=self.total)
        return lambda size: self.bar.advance(task, size)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
