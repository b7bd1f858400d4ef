"""What is installed, from metadata alone. Only `load` and `load_value` import. This module is imported by `kernel --help`,
so it needs nothing but the standard library."""

from __future__ import annotations

import functools
import importlib
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from kernel_core.errors import ConfigError, PluginError

#: kind of plugin → entry-point group
GROUPS = {
    "plugin": "kernel_core.plugins",
    "device": "kernel_core.devices",
    "model": "kernel_core.models",
    "command": "kernel_core.commands",
    "checkpoint": "kernel_core.checkpoints",
}


@dataclass(frozen=True, slots=True, order=True)
class Found:
    """One entry point. `module` is its value ("module" or "module:attribute"), `summary` the distribution's description."""

    kind: str
    name: str
    module: str
    distribution: str
    version: str
    summary: str = ""

    @property
    def title(self) -> str:
        return f"the {self.kind} {self.name!r} ({self.distribution} {self.version})"


class Installed:
    """A snapshot of all entry points of the kernel's groups. Reads metadata, imports nothing."""

    def __init__(self) -> None:
        points = metadata.entry_points()
        self.found = sorted({_describe(kind, point) for kind, group in GROUPS.items() for point in points.select(group=group)})

    def all(self, kind: str) -> list[Found]:
        return [found for found in self.found if found.kind == kind]

    def names(self, kind: str) -> list[str]:
        return [found.name for found in self.all(kind)]

    def get(self, kind: str, name: str) -> Found | None:
        """None when nothing of this name is installed. Raises ConfigError when two distributions offer it."""
        matches = [found for found in self.all(kind) if found.name == name]
        if len(matches) > 1:
            owners = " and ".join(f"{found.distribution} {found.version}" for found in matches)
            raise ConfigError(f"the {kind} {name!r} is offered by {owners}: uninstall all but one")
        return matches[0] if matches else None


def _describe(kind: str, point: metadata.EntryPoint) -> Found:
    about = point.dist
    if about is None:
        return Found(kind, point.name, point.value, "unknown", "0")
    summary = (about.metadata.get_all("Summary") or [""])[0]  # the back port's [] raises for a missing key
    return Found(kind, point.name, point.value, about.name, about.version, summary)


def load_value(value: str) -> Any:
    """Import "module" or "module:attribute"."""
    module, _, attribute = value.partition(":")
    loaded = importlib.import_module(module)
    return functools.reduce(getattr, attribute.split("."), loaded) if attribute else loaded


def load(found: Found) -> Any:
    """Import what an entry point names. Raises PluginError with the traceback."""
    try:
        return load_value(found.module)
    except (Exception, SystemExit) as error:
        trace = "".join(traceback.format_exception(error)).rstrip()
        raise PluginError(f"{found.title} failed to load from {found.module!r}:\n{trace}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: empty, or the nearest known one."""
    import difflib

    near = difflib.get_close_matches(name, sorted(set(known)), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def install_hint(name: str) -> str:
    return f"pip install kernel-{name.replace('_', '-')}"


@functools.cache
def profile_data() -> dict[str, Any]:
    """The data file of the default profile."""
    import tomllib

    return tomllib.loads(Path(__file__).with_name("default_profile.toml").read_text())


def profile(name: str) -> dict[str, str]:
    """Plugins of a profile → the group they are listed in. Raises ConfigError for an unknown profile."""
    profiles = profile_data()["profiles"]
    if name not in profiles:
        raise ConfigError(f"profile = {name!r}: there are {sorted(profiles)}{did_you_mean(name, profiles)}")
    return {plugin: group for group, plugins in profiles[name].items() for plugin in plugins}
