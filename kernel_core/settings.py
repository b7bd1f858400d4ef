"""Configuration from kernel.toml, `--set path=value` and keyword arguments, with errors that name the source, the key and
the nearest valid key. Plugins' own sections are validated by the resolver, with the same messages."""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from kernel_core.config import EngineConfig, KernelConfig
from kernel_core.discovery import Installed, did_you_mean
from kernel_core.errors import ConfigError

FILE = "kernel.toml"
Source = tuple[str, Mapping[str, Any]]  # (name for messages, nested values)
KeyPath = tuple[str, ...]


# ---- faces: command line, Python


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that every command has; the program `kernel` adds them."""
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", metavar="FILE", help=f"configuration file (default: ./{FILE} if there is one)")
    group.add_argument("--model", metavar="NAME", help="a directory, a hub id, or the name of an embedded checkpoint")
    group.add_argument("--device", metavar="NAME", help="an installed device, or auto")
    group.add_argument(
        "--set",
        metavar="PATH=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="any key of the file, for example engine.max_requests=8 or plugins.NAME=false; may be repeated",
    )


def config_from_arguments(arguments: argparse.Namespace) -> KernelConfig:
    """What `add_arguments` parsed: the file, then --model and --device, then --set, and the plugins the command enables.
    Raises ConfigError."""
    options = {key: getattr(arguments, key) for key in ("model", "device") if getattr(arguments, key) is not None}
    sources = [_file(arguments.config), ("command line", options)]
    sources += [(f"--set {text}", parse_setting(text)) for text in arguments.settings]
    named = merge_sources(sources).get("plugins", {})
    enabled = {name: {} for name in getattr(arguments, "enable", ()) if name not in named}
    return build([*sources, ("the command", {"plugins": enabled})])


def config_from_keywords(config: KernelConfig | Mapping[str, Any] | str | Path | None = None, **keys: Any) -> KernelConfig:
    """A configuration from Python: `config` (an object, nested mappings or a file), and keys on top of it. Keys of
    `[engine]` may be given flat. Raises ConfigError for a key that nobody knows."""
    if isinstance(config, str | Path):
        base = _file(config)
    else:
        base = ("config", as_data(config) if isinstance(config, KernelConfig) else config or {})
    flat = {key: value for key, value in keys.items() if key in EngineConfig.model_fields}
    top = {key: value for key, value in keys.items() if key not in flat}
    return build([base, ("keyword arguments", {"engine": flat} if flat else {}), ("keyword arguments", top)])


def _file(path: str | Path | None) -> Source:
    chosen = Path(path or FILE)
    if not chosen.is_file():
        if path is None:
            return FILE, {}
        raise ConfigError(f"there is no configuration file {str(path)!r}")
    try:
        return str(chosen), tomllib.loads(chosen.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{chosen} is not valid TOML: {error}") from error


def parse_setting(text: str) -> dict[str, Any]:
    """ "engine.max_requests=8" → nested values. The value is TOML; a bare word is a string."""
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set {text}: write PATH=VALUE, for example --set engine.max_requests=8")
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        parsed = value.strip()
        if parsed[:1] in ("", "[", "{", '"', "'"):
            raise ConfigError(f"--set {text}: the value is neither TOML nor a bare word: {error}") from error
    for key in reversed(keys):
        parsed = {key: parsed}
    return parsed


# ---- merging and validating


def merge(low: Any, high: Any, path: KeyPath = ()) -> Any:
    """`high` over `low`, table by table; `plugins.NAME = true` keeps the section that is there."""
    if not isinstance(high, Mapping):
        keeps = high is True and path[:-1] == ("plugins",) and isinstance(low, Mapping)
        return low if keeps else high
    low = low if isinstance(low, Mapping) else {}
    return {**low, **{key: merge(low.get(key), value, (*path, key)) for key, value in high.items()}}


def merge_sources(sources: Sequence[Source]) -> dict[str, Any]:
    return reduce(merge, (values for _, values in sources), dict[str, Any]())


def as_data(config: KernelConfig) -> dict[str, Any]:
    """What was set on purpose, as JSON data. Raises ConfigError for values that cannot travel to other processes."""
    try:
        return config.model_dump(mode="json", exclude_unset=True)
    except ValueError as error:
        raise ConfigError(f"the configuration must be made of numbers, strings, booleans, lists and tables: {error}") from error


def build(sources: Sequence[Source]) -> KernelConfig:
    """Later sources win. Raises ConfigError with one line per problem."""
    merged = merge_sources(sources)
    try:
        return KernelConfig.model_validate(merged)
    except ValidationError as error:
        problems = problem_lines(error, KernelConfig)
    lines = [f"{_origin(sources, path)}: {label(path)}: {text}{_hint(path, text)}" for path, text in problems]
    raise ConfigError("\n".join(lines))


def validate_section(name: str, model: type[BaseModel], values: Mapping[str, Any]) -> Any:
    """The typed section of a plugin. Raises ConfigError with lines like "[plugins.NAME] key: what is wrong"."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = problem_lines(error, model)
    lines = []
    for path, text in problems:
        near = did_you_mean(path[-1], model.model_fields) if path and text == UNKNOWN else ""
        known = f" (it has {', '.join(model.model_fields) or 'no keys'})" if text == UNKNOWN and not near else ""
        lines.append(f"{label(('plugins', name, *path))}: {text}{near}{known}")
    raise ConfigError("\n".join(lines))


UNKNOWN = "unknown key"


def problem_lines(error: ValidationError, model: type[BaseModel]) -> list[tuple[KeyPath, str]]:
    """(path, what is wrong) of each problem; the branches of a union are joined."""
    problems: dict[KeyPath, list[str]] = {}
    for detail in error.errors(include_url=False):
        path = tuple(_fields(detail["loc"], model))
        if detail["type"] == "extra_forbidden":
            text = UNKNOWN
        else:
            text = detail["msg"].removeprefix("Value error, ")
            text = text[0].lower() + text[1:] + (f", got {detail['input']!r}" if detail["type"] != "missing" else "")
        problems.setdefault(path, []).append(text)
    return [(path, " or ".join(dict.fromkeys(texts))) for path, texts in problems.items()]


def _fields(location: Sequence[str | int], model: type[BaseModel]) -> Iterator[str]:
    """The part of an error's location that users wrote: without the names of union branches."""
    for depth, part in enumerate(location):
        yield str(part)
        field = model.model_fields.get(str(part))
        if field is None:
            return
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            if part == "plugins" and len(location) > depth + 1:
                yield str(location[depth + 1])
            return
        model = field.annotation


def label(path: KeyPath) -> str:
    """As in the file: "[engine] max_requests", "[plugins.NAME]", "model"."""
    if len(path) == 2 and path[0] == "plugins":
        return f"[plugins.{path[1]}]"
    table = f"[{'.'.join(path[:-1])}] " if len(path) > 1 else ""
    return table + path[-1] if path else "configuration"


def _origin(sources: Sequence[Source], path: KeyPath) -> str:
    for name, values in reversed(sources):
        inner: Any = values
        for key in path:
            inner = inner.get(key, MISSING) if isinstance(inner, Mapping) else MISSING
        if inner is not MISSING:
            return name
    return "configuration"


MISSING = object()


def _hint(path: KeyPath, text: str) -> str:
    """Where an unknown key could live."""
    if len(path) == 2 and path[0] == "plugins":
        return " (a plugin's section is a table, true or false)"
    if text != UNKNOWN:
        return ""
    key = path[-1]
    if path[:-1] == () and key in EngineConfig.model_fields:
        return f"; it belongs to the table [engine]: engine.{key}"
    if path[0] == "engine" and key in KernelConfig.model_fields:
        return "; it belongs to the top level, above the tables"
    installed = Installed()
    if key in (*installed.names("plugin"), *installed.names("device")):
        return f"; a plugin's settings belong to the table [plugins.{key}]"
    engine = {f"engine.{name}" for name in EngineConfig.model_fields}
    top = set(KernelConfig.model_fields)
    nearest = did_you_mean(key, EngineConfig.model_fields if path[0] == "engine" else top)
    return nearest or did_you_mean(f"engine.{key}", engine) or did_you_mean(key, top)
