"""Which plugins a configuration names: found among what is installed, loaded, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pluggy import PluginManager

from kernel_core.config import KernelConfig
from kernel_core.discovery import Found, Installed, did_you_mean, install_hint, load, profile, profile_data
from kernel_core.errors import ConfigError, PluginError
from kernel_core.manifest import API_VERSION, Manifest
from kernel_core.registry import check_hooks, hooks_of, implementations, plugin_manager
from kernel_core.settings import validate_section

IN_PROCESS = "in_process"  # `executor`: the kernel's own, also when a plugin offers another


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

    def section(self, values: Mapping[str, Any]) -> Any:
        """The plugin's typed section. Raises ConfigError."""
        return validate_section(self.name, self.manifest.section, values)

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


def devices_in_question(config: KernelConfig, installed: Installed) -> list[Found]:
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
            " it, or of kernel-core, that fits"
        )
