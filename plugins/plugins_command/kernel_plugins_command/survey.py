"""What is installed and what takes part, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from kernel_core.api import Found, Installed, KernelConfig, PluginError, configure, install_hint, load, profile, profile_data


@dataclass(frozen=True, slots=True)
class Row:
    """One plugin. `state`: "enabled" (the configuration names it), "default" (the profile does), "installed", "off", "missing",
    "broken"; `reason` says how to install a missing one and why one is broken. A family's `name` lists its architectures."""

    kind: str
    name: str
    distribution: str
    version: str
    state: str
    summary: str
    reason: str = ""


def survey(config: KernelConfig) -> list[Row]:
    """Every installed plugin, and those that are named and missing. Imports light modules to find broken ones; a broken plugin
    is a row, not an error. Raises ConfigError for an unknown profile."""
    installed = Installed()
    rows = [_row(found, config) for found in _grouped(installed.found)]
    return sorted([*rows, *_missing(config, installed)], key=lambda row: (_KINDS.index(row.kind), row.name))


_KINDS = ("plugin", "device", "command", "model", "checkpoint")


def _grouped(all_found: Iterable[Found]) -> list[Found]:
    """The architectures of one family as one."""
    groups: dict[tuple[str, str, str], Found] = {}
    for found in all_found:
        key = (found.kind, found.distribution, found.module if found.kind == "model" else found.name)
        before = groups.get(key)
        groups[key] = replace(found, name=f"{before.name}, {found.name}") if before else found
    return list(groups.values())


def _row(found: Found, config: KernelConfig) -> Row:
    summary, state, reason = found.summary, _state(found.kind, found.name, config), ""
    try:
        if found.kind in ("plugin", "device"):
            summary = configure(found, "").manifest.summary
        else:
            load(found)
    except PluginError as error:
        state, reason = "broken", _one_line(error)
    return Row(found.kind, found.name, found.distribution, found.version, state, summary, reason)


def _one_line(error: PluginError) -> str:
    """The last line of a message is, for a failed import, the exception itself."""
    return str(error).strip().splitlines()[-1]


def _state(kind: str, name: str, config: KernelConfig) -> str:
    if kind == "command" and name in profile_data()["commands"]:
        return "default"
    if kind == "device" and config.device == name:
        return "enabled"
    if kind != "plugin":
        return "installed"
    if config.plugins.get(name) is False:
        return "off"
    if name in config.plugins or name == config.executor:
        return "enabled"
    return "default" if name in profile(config.profile) else "installed"


def _missing(config: KernelConfig, installed: Installed) -> list[Row]:
    named = {name for name, section in config.plugins.items() if section is not False} | set(profile(config.profile))
    off = {name for name, section in config.plugins.items() if section is False}
    plugins = named - off - {*installed.names("plugin"), *installed.names("device")}
    rows = [Row("plugin", name, "", "", "missing", "", install_hint(name)) for name in plugins]
    commands = profile_data()["commands"].items()
    known = installed.names("command")
    return rows + [Row("command", n, d, "", "missing", "", f"pip install {d}") for n, d in commands if n not in known]
