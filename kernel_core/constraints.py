"""Constraints of plugins on configuration values: combined purely, so that their order does not matter."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from kernel_core.config import EngineConfig, KernelConfig
from kernel_core.discovery import did_you_mean
from kernel_core.errors import ConfigError, PluginError
from kernel_core.manifest import Constraint

Asked = list[tuple[str, Constraint]]  # (plugin, constraint)
Sections = Mapping[str, type[BaseModel]]  # of the enabled plugins and the device
UNSET = object()


@dataclass(frozen=True)
class Imposed:
    """What plugins made of one value that the user had left open."""

    value: Any
    lines: tuple[str, ...]
    plugins: tuple[str, ...]


def apply(given: Mapping[str, Any], imposed: Mapping[str, Imposed]) -> dict[str, Any]:
    """The user's values with the imposed ones filled in."""
    data = copy.deepcopy(dict(given))
    for path, what in imposed.items():
        *tables, key = path.split(".")
        inner = data
        for table in tables:
            inner = inner.setdefault(table, {})
        inner[key] = what.value
    return data


def impose(given: Mapping[str, Any], asked: Asked, sections: Sections) -> dict[str, Imposed]:
    """Path → the value to take instead of the default. Raises ConfigError when a value the user set is not allowed, when two
    plugins allow nothing in common, or when a plugin refuses another; PluginError for a path that does not exist."""
    paths: dict[str, Asked] = {}
    for plugin, constraint in sorted(asked, key=lambda pair: (pair[0], pair[1].path, repr(pair[1].allowed))):
        if not constraint.allowed:
            raise PluginError(f"the plugin {plugin!r} allows no value for {constraint.path!r}; a constraint needs at least one")
        paths.setdefault(constraint.path, []).append((plugin, constraint))
    results = {path: _impose_one(path, given, group, sections) for path, group in paths.items()}
    return {path: value for path, value in results.items() if value is not None}


def _impose_one(path: str, given: Mapping[str, Any], asked: Asked, sections: Sections) -> Imposed | None:
    keys = path.split(".")
    if keys[0] == "plugins" and len(keys) == 2:
        return _check_combination(keys[1], asked, keys[1] in sections)
    default = _default(keys, asked[0][0], sections)
    if default is UNSET:
        return None
    common = [value for value in asked[0][1].allowed if all(_has(c.allowed, value) for _, c in asked)]
    if not common:
        raise ConfigError(f"no value of {path} suits all: {_sentences(asked)}. Leave one of them out with `plugins.NAME = false`")
    value = _get(given, keys)
    if value not in (UNSET, "auto"):
        if not _has(common, value):
            raise ConfigError(f"{path} = {value!r} cannot be: {_sentences([a for a in asked if not _has(a[1].allowed, value)])}")
        return None
    if _has(common, default):
        return None
    ranks = [(sum(r := [c.allowed.index(v) for _, c in asked]), r, v) for v in common]
    best = min(ranks, key=lambda rank: rank[:2])[2]
    lines = tuple(f"{path} = {best!r}: {plugin}: {c.reason}" for plugin, c in asked)
    return Imposed(best, lines, tuple(plugin for plugin, _ in asked))


def _check_combination(name: str, asked: Asked, enabled: bool) -> None:
    refusing = [f"{plugin} ({c.reason})" for plugin, c in asked if enabled not in c.allowed]
    if refusing and enabled:
        raise ConfigError(
            f"{name} cannot run together with {' and '.join(refusing)}: set `plugins.{name} = false` or leave the other out"
        )
    if refusing:
        raise ConfigError(f"{name} is needed by {' and '.join(refusing)}: enable it with [plugins.{name}]")


def _sentences(asked: Asked) -> str:
    return "; ".join(f"{p} allows {', '.join(map(repr, c.allowed))} ({c.reason})" for p, c in asked)


def _has(allowed: Iterable[object], value: object) -> bool:
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def _get(data: Mapping[str, Any], keys: list[str]) -> Any:
    inner: Any = data
    for key in keys:
        if not isinstance(inner, Mapping) or key not in inner:
            return UNSET
        inner = inner[key]
    return inner


def _default(keys: list[str], plugin: str, sections: Sections) -> Any:
    """The default of a value; UNSET when its plugin is not enabled. Raises PluginError when there is no such value."""
    model, key = KernelConfig, keys[-1]
    if keys[0] == "engine" and len(keys) == 2:
        model = EngineConfig
    elif keys[0] == "plugins" and len(keys) == 3:
        if keys[1] not in sections:
            return UNSET
        model = sections[keys[1]]
    elif len(keys) > 1:
        key = ""
    if key not in model.model_fields or keys in (["engine"], ["plugins"]):
        path = ".".join(keys)
        raise PluginError(
            f"the plugin {plugin!r} constrains {path!r}, which does not exist{did_you_mean(keys[-1], model.model_fields)}"
        )
    return model.model_fields[key].get_default(call_default_factory=True)
