"""From a configuration to a frozen plan: which plugins take part, in which order, on which device, with which values, and why.

`resolve` discovers and configures (imports light modules), then `settle` decides, purely: it reads manifests and calls
`constrain`, changes nothing, and gives the same plan whatever the order in which plugins were found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from importlib import metadata
from typing import Any

from pydantic import TypeAdapter

from kernel_core.config import KernelConfig
from kernel_core.constraints import Imposed, apply, impose
from kernel_core.discovery import Installed
from kernel_core.enabling import IN_PROCESS, Configured, PluginEntry, configure, devices_in_question, enabled_plugins
from kernel_core.errors import ConfigError
from kernel_core.manifest import Constraint
from kernel_core.ordering import declared, in_order
from kernel_core.registry import HOOKS, exclusive_message, hooks_of
from kernel_core.settings import as_data, build

ROUNDS = 20  # of constraints, before they are called unstable
KERNEL = "kernel-core"


@dataclass(frozen=True)
class ResolvedPlan:
    """The decisions, the same in every process of an engine. `config` is final: constraints applied, device named, one section
    per enabled plugin. `plugins` are in resolved order, without the device. `executor` None: in this process."""

    config: KernelConfig
    plugins: tuple[PluginEntry, ...]
    device: PluginEntry
    executor: str | None
    explanation: tuple[str, ...]
    kernel: str = ""  # version of the kernel's distribution

    def _data(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"config": as_data(self.config)}

    @cached_property
    def hash(self) -> str:
        """sha256 of the plan's canonical JSON."""
        return hashlib.sha256(_canonical(self._data())).hexdigest()

    def to_json(self) -> bytes:
        return _canonical({"plan": self._data(), "hash": self.hash})

    @classmethod
    def from_json(cls, data: bytes) -> ResolvedPlan:
        """Raises ConfigError when the plan is not what was written."""
        document = json.loads(data)
        plan: ResolvedPlan = TypeAdapter(cls).validate_python(document["plan"])
        if plan.hash != document["hash"]:
            raise ConfigError("the plan was changed on its way: its hash does not fit")
        return plan

    def verify_installed(self) -> None:
        """Raise ConfigError when this process would run other code than the one that made the plan."""
        wanted = {KERNEL: self.kernel} | {e.distribution: e.version for e in (self.device, *self.plugins)}
        for distribution, version in wanted.items():
            here = _version(distribution)
            if here != version:
                found = f"has {distribution} {here}" if here else f"has no {distribution}"
                raise ConfigError(
                    f"this process {found}, the plan was made with {version}: every process of an engine needs the same"
                    f" distributions (pip install {distribution}=={version})"
                )


def _canonical(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=asdict).encode()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def resolve(config: KernelConfig | Mapping[str, Any], *, enable: Sequence[str] = ()) -> ResolvedPlan:
    """Discover, configure, resolve. `enable` names further plugins (those a command needs). Imports the light modules of the
    enabled plugins and of the devices in question; no torch. Raises ConfigError, PluginError."""
    if not isinstance(config, KernelConfig):
        config = build([("configuration", config)])
    installed = Installed()
    plugins = [configure(found, reason) for found, reason in enabled_plugins(config, enable, installed)]
    devices = [configure(found, "device") for found in devices_in_question(config, installed)]
    return settle(config, plugins, devices)


# ---- resolve: pure


def settle(config: KernelConfig, plugins: Iterable[Configured], devices: Iterable[Configured]) -> ResolvedPlan:
    """Decide. Pure, and independent of the order of `plugins` and `devices`. Raises ConfigError, PluginError."""
    plugins = sorted(plugins, key=lambda plugin: plugin.name)
    devices = sorted(devices, key=lambda device: device.name)
    devices = in_order(devices, declared(devices, {}))
    config, device, lines = _constrain(config, plugins, devices)
    parts = [device, *plugins]
    providers = _services(parts)
    _check_exclusive(parts)
    executor, why_executor = _executor(config, plugins)
    edges = declared(plugins, providers)
    ordered = in_order(plugins, edges)
    chosen = [f"plugin {p.name}: {p.found.distribution} {p.found.version}, {p.reason}" for p in ordered]
    order = f"order: {' → '.join(p.name for p in ordered) or 'no plugins'}"
    because = sorted(f"order: {first} before {second}: {why}" for (first, second), why in edges.items())
    served = [f"service {name}: provided by {plugin}" for name, plugin in sorted(providers.items())]
    return ResolvedPlan(
        config=config,
        plugins=tuple(plugin.entry for plugin in ordered),
        device=device.entry,
        executor=executor,
        explanation=(f"device {device.name}: {device.reason}", *chosen, order, *because, *served, why_executor, *lines),
        kernel=_version(KERNEL) or "",
    )


def _constrain(
    config: KernelConfig, plugins: Sequence[Configured], devices: Sequence[Configured]
) -> tuple[KernelConfig, Configured, list[str]]:
    """Ask everybody what they need until nothing changes."""
    given = as_data(config)
    sections = given.get("plugins", {})
    off = {name: False for name, section in sections.items() if section is False}
    given["plugins"] = off | {plugin.name: _section(sections, plugin.name) for plugin in plugins}
    given |= {"device": config.device}
    names = {plugin.name for plugin in plugins}
    imposed: dict[str, Imposed] = {}
    before = imposed
    for _ in range(ROUNDS):
        data = apply(given, imposed)
        device = _choose_device(data["device"], devices, sections, names)
        data["device"] = device.name
        data["plugins"][device.name] = {**_section(sections, device.name), **data["plugins"].get(device.name, {})}
        current = build([(f"constraints of {_owners(imposed)}", data)])
        asked = [(p.name, constraint) for p in (device, *plugins) for constraint in _constraints(p, current)]
        answer = impose(given, asked, {p.name: p.manifest.section for p in (device, *plugins)})
        if answer == imposed:
            unused = sorted({n for n, s in sections.items() if s is not False} - names - {device.name})
            lines = [f"[plugins.{name}] is not used: the device is {device.name}" for name in unused]
            return current, device, [line for _, value in sorted(imposed.items()) for line in value.lines] + lines
        imposed, before = answer, imposed
    raise ConfigError(f"the constraints of {_owners(imposed | before)} never settle: each answer changes another's")


def _owners(imposed: Mapping[str, Imposed]) -> str:
    return ", ".join(sorted({plugin for value in imposed.values() for plugin in value.plugins}))


def _section(sections: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`plugins.NAME = true` is an empty table."""
    section = sections.get(name)
    return section if isinstance(section, dict) else {}


def _constraints(plugin: Configured, config: KernelConfig) -> Sequence[Constraint]:
    section = plugin.section(_section(config.plugins, plugin.name))
    return plugin.ask("constrain", config=config, section=section) or ()


def _choose_device(wanted: str, devices: Sequence[Configured], sections: Mapping[str, Any], plugins: set[str]) -> Configured:
    """The named device, or for "auto" the first, in declared order, that says it can run."""
    refused = []
    for device in devices:
        if wanted not in ("auto", device.name):
            continue
        if device.name in plugins:
            raise ConfigError(f"{device.name!r} is both a device and an enabled plugin: set `plugins.{device.name} = false`")
        reason = device.ask("probe_device", section=device.section(_section(sections, device.name)))
        if reason is None:
            skipped = "".join(f"; {line}" for line in refused)
            return replace(device, reason="named" if wanted != "auto" else f"auto: first that can run here{skipped}")
        refused.append(f"{device.name}: {reason}")
    raise ConfigError(f"device = {wanted!r}: no device can run here. {'; '.join(refused) or 'It is not installed.'}")


def _services(parts: Sequence[Configured]) -> dict[str, str]:
    """Service → provider. Raises ConfigError for two providers, a missing one, or another major version."""
    providers: dict[str, str] = {}
    for part in parts:
        for name in part.manifest.provides:
            if providers.setdefault(name, part.name) != part.name:
                raise ConfigError(exclusive_message(f"provider of the service {name}", [providers[name], part.name]))
    for part in parts:
        for name in part.manifest.requires:
            if name not in providers:
                raise ConfigError(_no_provider(part.name, name, providers))
    return providers


def _no_provider(plugin: str, name: str, providers: Mapping[str, str]) -> str:
    base = name.partition("/")[0]
    others = [f"{owner} provides {other}" for other, owner in providers.items() if other.partition("/")[0] == base]
    return (
        f"the plugin {plugin!r} needs the service {name!r}, which no enabled plugin provides"
        f"{' (' + '; '.join(others) + ')' if others else ''}: enable one that does, or set `plugins.{plugin} = false`"
    )


def _check_exclusive(parts: Sequence[Configured]) -> None:
    """Places from the manifests, and those that exclusive hooks imply. Executors are chosen by the configuration."""
    owners: dict[str, list[str]] = {}
    for part in parts:
        hooks = [
            h for h in hooks_of(part.module) if getattr(HOOKS.get(h), "composes", "") == "exclusive" and h != "make_executor"
        ]
        for place in {*part.manifest.exclusive, *(hook.removeprefix("make_") for hook in hooks)}:
            owners.setdefault(place, []).append(part.name)
    for place, names in sorted(owners.items()):
        if len(names) > 1:
            raise ConfigError(exclusive_message(place, sorted(names)))


def _executor(config: KernelConfig, plugins: Sequence[Configured]) -> tuple[str | None, str]:
    offered = [plugin.name for plugin in plugins if "make_executor" in hooks_of(plugin.module)]
    if config.executor == IN_PROCESS:
        return None, "executor: in this process: named"
    if config.executor is not None:
        if config.executor not in offered:
            raise ConfigError(f"executor = {config.executor!r}: this plugin has no executor (those that have: {offered})")
        return config.executor, f"executor: {config.executor}: named"
    if len(offered) > 1:
        raise ConfigError(f'{" and ".join(offered)} each offer an executor: choose with `executor = "NAME"`')
    if offered:
        return offered[0], f"executor: {offered[0]}: the only one enabled"
    return None, "executor: in this process: no enabled plugin offers another"
