"""What a plugin says of itself: its manifest. Read when the plugin's light entry-point module is imported."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

API_VERSION = "0.1"


class Section(BaseModel):
    """Base of every plugin's typed config section; unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A plugin's entry-point module holds one, named `manifest`.

    name: the key of the entry point and of the config section. api: the range of `API_VERSION` it was written for.
    before / after: names of plugins it must precede or follow in every chain; "*": all that do not say the same. Among
    devices they order what `device = "auto"` tries. provides / requires: services as "name/1"; uses: such that it does without.
    exclusive: places only one enabled plugin may take ("drafter", "prefix_index", ...); `make_*` hooks that are
    exclusive imply theirs. section: the pydantic model of `[plugins.<name>]`. summary: one line for `kernel plugins`."""

    name: str
    summary: str
    api: str = ">=0.1,<1"
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    exclusive: tuple[str, ...] = ()
    section: type[Section] = Section


@dataclass(frozen=True, slots=True)
class ModelFamily:
    """What an entry point of the group `kernel_core.models` names. `build` is "module:function" (torch is imported only
    there): (ModelContext) -> nn.Module. `weights` is "module:data", the family's name map."""

    name: str
    build: str
    weights: str
    summary: str = ""


@dataclass(frozen=True, slots=True)
class Command:
    """What an entry point of the group `kernel_core.commands` names: `kernel NAME`. `run` is "module:function", called with
    the argparse namespace; `arguments` is "module:function" adding arguments to a parser. Neither is imported for
    `kernel --help`."""

    name: str
    summary: str
    arguments: str
    run: str
    enables: tuple[str, ...] = ()  # plugins a run of it enables


@dataclass(frozen=True, slots=True)
class Constraint:
    """Returned by the hook `constrain`: the configuration value at `path` must be one of `allowed`, because of `reason`.

    `path` is a kernel key ("engine.dtype", "device") or "plugins.NAME.key" (no effect while NAME is not enabled). When the
    user set nothing, or "auto", and the default is not allowed, the value that all plugins allow and list earliest is taken.
    Constraints without a common value are a start-up error naming the plugins. `path` "plugins.NAME" with allowed (False,)
    refuses to run together with NAME."""

    path: str
    allowed: tuple[object, ...]
    reason: str
