"""From a configuration to a frozen plan: which plugins take part, in which order, on which device, with which values, and why.

`resolve` discovers and configures (imports light modules), then `settle` decides, purely: it reads manifests and calls
`constrain`, changes nothing, and gives the same plan whatever the order in which plugins were found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import metadata
from itertools import pairwise
from typing import Any

from pluggy import PluginManager

from kernel_core.config import KernelConfig
from kernel_core.constraints import Imposed, apply, impose
from kernel_core.discovery import Found, Installed, did_you_mean, install_hint, load, profile, profile_data
from kernel_core.errors import ConfigError, PluginError
from kernel_core.manifest import API_VERSION, Constraint, Manifest
from kernel_core.registry import HOOKS, check_hooks, exclusive_message, hooks_of, implementations, plugin_manager
from kernel_core.settings import as_data, build, validate_section

IN_PROCESS = "in_process"  # `executor`: the kernel's own, also when a plugin offers another
ROUNDS = 20  # of constraints, before they are called unstable
KERNEL = "kernel-core"


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """A plugin of the plan. `module` is its entry point's value, `reason` why it takes part."""

    name: str
    kind: str
    module: str
    distribution: str
    version: str
    reason: str

    @property
    def found(self) -> Found:
        return Found(self.kind, self.name, self.module, self.distribution, self.version)


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
        return {
            "config": as_data(self.config),
            "plugins": [asdict(entry) for entry in self.plugins],
            "device": asdict(self.device),
            "executor": self.executor,
            "explanation": list(self.explanation),
            "kernel": self.kernel,
        }

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
        values = document["plan"]
        plan = cls(
            config=KernelConfig.model_validate(values["config"]),
            plugins=tuple(PluginEntry(**entry) for entry in values["plugins"]),
            device=PluginEntry(**values["device"]),
            executor=values["executor"],
            explanation=tuple(values["explanation"]),
            kernel=values["kernel"],
        )
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
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


# ---- discover and configure


@dataclass(frozen=True)
class Configured:
    """A plugin whose light module is loaded and checked."""

    found: Found
    module: Any
    reason: str

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def manifest(self) -> Manifest:
        return self.module.manifest

    def ask(self, hook: str, **arguments: Any) -> Any:
        """Call a hook of the resolve phase; None where the plugin does not implement it."""
        call = implementations(self._manager, hook).get(self.name)
        return call(**arguments) if call else None

    @cached_property
    def _manager(self) -> PluginManager:
        return plugin_manager({self.name: self.module})

    @property
    def entry(self) -> PluginEntry:
        found = self.found
        return PluginEntry(found.name, found.kind, found.module, found.distribution, found.version, self.reason)


def resolve(config: KernelConfig | Mapping[str, Any], *, enable: Sequence[str] = ()) -> ResolvedPlan:
    """Discover, configure, resolve. `enable` names further plugins (those a command needs). Imports the light modules of the
    enabled plugins and of the devices in question; no torch. Raises ConfigError, PluginError."""
    if not isinstance(config, KernelConfig):
        config = build([("configuration", config)])
    installed = Installed()
    plugins = [configure(found, reason) for found, reason in enabled_plugins(config, enable, installed)]
    devices = [configure(found, "device") for found in _devices(config, installed)]
    return settle(config, plugins, devices)


def enabled_plugins(config: KernelConfig, enable: Sequence[str], installed: Installed) -> list[tuple[Found, str]]:
    """Who takes part, and why. Raises ConfigError for a name that is not installed."""
    in_profile = profile(config.profile)
    reasons = {name: f"profile {config.profile} ({group})" for name, group in in_profile.items()}
    reasons |= dict.fromkeys(enable, "the command enables it")
    if config.executor not in (None, IN_PROCESS):
        reasons[config.executor] = "executor"
    reasons |= {name: "configuration" for name, section in config.plugins.items() if section is not False}
    devices = set(installed.names("device"))
    wanted = []
    for name in sorted({*reasons, *config.plugins}):
        found = installed.get("plugin", name)
        switched_off = config.plugins.get(name) is False
        if switched_off and (name in enable or name == config.executor):
            raise ConfigError(f"plugins.{name} = false, but {reasons[name]}: remove one of the two")
        if found is None and name not in devices and not (switched_off and name in in_profile):
            raise ConfigError(_not_installed(name, reasons.get(name), installed))
        if found is not None and not switched_off:
            wanted.append((found, reasons[name]))
    return wanted


def _not_installed(name: str, reason: str | None, installed: Installed) -> str:
    if reason is None:
        near = did_you_mean(name, installed.names("plugin"))
        return f"plugins.{name} = false: there is no plugin of this name{near or ': remove the line'}"
    near = did_you_mean(name, [*installed.names("plugin"), *installed.names("device")])
    if reason.startswith("profile"):
        return f"the plugin {name!r} of the {reason} is not installed: {install_hint(name)}, or set `plugins.{name} = false`"
    return f"the plugin {name!r} ({reason}) is not installed{near}{'' if near else '.'} To install it: {install_hint(name)}"


def _devices(config: KernelConfig, installed: Installed) -> list[Found]:
    """The devices in question: the named one, or for "auto" all that are not switched off."""
    advice = f"pip install {profile_data()['advice']['device']}"
    if config.device != "auto":
        found = installed.get("device", config.device)
        if found is None:
            known = installed.names("device")
            near = did_you_mean(config.device, known) or f" (installed: {', '.join(known) or 'none'})."
            raise ConfigError(f"device = {config.device!r} is not installed{near} To install it: {install_hint(config.device)}")
        if config.plugins.get(found.name) is False:
            raise ConfigError(f"device = {found.name!r}, but plugins.{found.name} = false: remove one of the two")
        return [found]
    names = {name for name in installed.names("device") if config.plugins.get(name) is not False}
    devices = [installed.get("device", name) for name in sorted(names)]
    if not devices:
        raise ConfigError(f"no device is installed: {advice}")
    return [found for found in devices if found is not None]


def configure(found: Found, reason: str) -> Configured:
    """Import the light module of a plugin and check manifest, api range and hooks. Raises PluginError."""
    module = load(found)
    manifest = getattr(module, "manifest", None)
    who = found.title
    if not isinstance(manifest, Manifest):
        raise PluginError(f"{who}: its module {found.module!r} has no `manifest = Manifest(...)`")
    if manifest.name != found.name:
        raise PluginError(f"{who}: its manifest is named {manifest.name!r}; entry point and manifest need the same name")
    _check_api(who, manifest.api)
    check_hooks(found.name, module)
    misplaced = {"make_device", "probe_device"} & hooks_of(module).keys()
    if misplaced and found.kind != "device":
        raise PluginError(f"{who} implements {min(misplaced)}: its entry point belongs to the group kernel_core.devices")
    return Configured(found, module, reason)


def _check_api(who: str, api: str) -> None:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        fits = API_VERSION in SpecifierSet(api)
    except InvalidSpecifier as error:
        raise PluginError(f"{who}: api = {api!r} is not a version range such as '>=0.1,<1'") from error
    if not fits:
        raise PluginError(
            f"{who} was written for the API {api}, this kernel has {API_VERSION}: install a version of"
            f" it, or of {KERNEL}, that fits"
        )


# ---- resolve: pure


def settle(config: KernelConfig, plugins: Iterable[Configured], devices: Iterable[Configured]) -> ResolvedPlan:
    """Decide. Pure, and independent of the order of `plugins` and `devices`. Raises ConfigError, PluginError."""
    plugins = sorted(plugins, key=lambda plugin: plugin.name)
    devices = _in_order(sorted(devices, key=lambda device: device.name), {})
    config, device, lines = _constrain(config, plugins, devices)
    parts = [device, *plugins]
    providers = _services(parts)
    _check_exclusive(parts)
    executor, why_executor = _executor(config, plugins)
    edges: dict[tuple[str, str], str] = {}
    ordered = _in_order(plugins, providers, edges)
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
    table = {p.name: s if isinstance(s := sections.get(p.name), dict) else {} for p in plugins}
    given["plugins"] = {name: s for name, s in sections.items() if s is False} | table
    given |= {"device": config.device}
    names = {plugin.name for plugin in plugins}
    imposed: dict[str, Imposed] = {}
    before = imposed
    for _ in range(ROUNDS):
        data = apply(given, imposed)
        device = _choose_device(data["device"], devices, sections, names)
        data["device"] = device.name
        data["plugins"][device.name] = {**sections.get(device.name, {}), **data["plugins"].get(device.name, {})}
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


def _constraints(plugin: Configured, config: KernelConfig) -> Sequence[Constraint]:
    values = config.plugins[plugin.name]
    section = validate_section(plugin.name, plugin.manifest.section, values if isinstance(values, Mapping) else {})
    return plugin.ask("constrain", config=config, section=section) or ()


def _choose_device(wanted: str, devices: Sequence[Configured], sections: Mapping[str, Any], plugins: set[str]) -> Configured:
    """The named device, or for "auto" the first, in declared order, that says it can run."""
    refused = []
    for device in devices:
        if wanted not in ("auto", device.name):
            continue
        if device.name in plugins:
            raise ConfigError(f"{device.name!r} is both a device and an enabled plugin: set `plugins.{device.name} = false`")
        section = validate_section(device.name, device.manifest.section, sections.get(device.name) or {})
        reason = device.ask("probe_device", section=section)
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
        hooks = [h for h in hooks_of(part.module) if HOOKS[h].composes == "exclusive" and h != "make_executor"]
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


def _in_order(
    parts: Sequence[Configured], providers: Mapping[str, str], edges: dict[tuple[str, str], str] | None = None
) -> list[Configured]:
    """Topological by before, after and services; then by name. `parts` come sorted by name."""
    edges = {} if edges is None else edges
    edges.update(_edges(parts, providers))
    left, ordered = list(parts), []
    while left:
        names = {part.name for part in left}
        free = next((p for p in left if not any(b == p.name and a in names for a, b in edges)), None)
        if free is None:
            raise ConfigError(_cycle(names, edges))
        left.remove(free)
        ordered.append(free)
    return ordered


def _edges(parts: Sequence[Configured], providers: Mapping[str, str]) -> dict[tuple[str, str], str]:
    """(first, second) → why. "*" stands for all that do not say the same."""
    edges: dict[tuple[str, str], str] = {}
    for part in parts:
        for field, place in (("before", lambda a, b: (a, b)), ("after", lambda a, b: (b, a))):
            said = getattr(part.manifest, field)
            star = [p.name for p in parts if "*" in said and "*" not in getattr(p.manifest, field)]
            for other in {*star, *said} & {p.name for p in parts} - {part.name}:
                edges[place(part.name, other)] = f"{part.name} says {field}"
        for service in part.manifest.requires:
            provider = providers.get(service, part.name)
            if provider in {p.name for p in parts} - {part.name}:
                edges.setdefault((provider, part.name), f"it provides {service}")
    return edges


def _cycle(names: Iterable[str], edges: Mapping[tuple[str, str], str]) -> str:
    """Walk backwards from any plugin that waits until one repeats."""
    names = set(names)
    walk = [min(names)]
    while walk.count(walk[-1]) < 2:
        walk.append(min(a for a, b in edges if b == walk[-1] and a in names))
    circle = walk[walk.index(walk[-1]) :][::-1]
    reasons = "; ".join(f"{a} before {b}: {edges[a, b]}" for a, b in pairwise(circle))
    return f"the plugins' order is a circle, {' → '.join(circle)} ({reasons}): leave one out with `plugins.NAME = false`"
