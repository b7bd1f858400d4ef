"""What a factory is given: narrow, frozen, and the same in every process because it derives from the frozen plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kernel_core.config import KernelConfig
from kernel_core.errors import PluginError
from kernel_core.plan import Capabilities, KVGroup

Part = Literal["face", "engine", "worker"]


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A checkpoint, without its weights. `config` is its config.json, `generation` its generation_config.json."""

    path: str
    format: str  # key of `make_checkpoint`
    config: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_path: str | None = None

    @property
    def architecture(self) -> str:
        return (self.config.get("architectures") or ["?"])[0]


def _no_hooks(hook: str, **arguments: Any) -> list[tuple[str, Any]]:
    raise PluginError(f"the hook {hook!r} was not declared by this plugin's add_hookspecs")


@dataclass(frozen=True, slots=True)
class BuildContext:
    """Given to every `make_*` hook of a plugin. `section` is the plugin's own validated config section; `config` the
    kernel's; `service("grammar/1", Grammar)` gives the provider of a service the manifest requires, checked against the
    Protocol of what this plugin uses of it (leave it out to take it as it is); None where nobody provides a service that the
    manifest only `uses`. `shared` is one dict for all hooks of this plugin in this part. `ask("hook", **arguments)` calls a hook
    that this plugin declared (`add_hookspecs`): (plugin, answer) of all that implement it, each with its own context.
    `explanation`: who takes part, in which order, and why, line by line, as `kernel plugins --explain` prints it."""

    plugin: str
    part: Part
    section: Any
    config: KernelConfig
    model: ModelInfo
    service: Callable[..., Any]
    shared: dict[str, Any] = field(default_factory=dict, kw_only=True)
    ask: Callable[..., list[tuple[str, Any]]] = field(default=_no_hooks, kw_only=True)
    explanation: tuple[str, ...] = field(default=(), kw_only=True)


@dataclass(frozen=True, slots=True)
class EngineContext(BuildContext):
    """Engine-part factories also know what the device can do and the sizes that were settled."""

    capabilities: Capabilities
    max_slots: int
    max_model_len: int
    max_tokens_per_step: int
    groups: tuple[KVGroup, ...] = ()
    num_blocks: tuple[int, ...] = ()  # per group, the null block included
