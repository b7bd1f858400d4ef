"""Which format and which reasoning tags belong to a model: what its configuration or its chat template says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from kernel_core.api import ConfigError, ModelInfo
from kernel_tool_calling.contract import ReasoningTags, ToolFormat

T = TypeVar("T")


def chat_template(model: ModelInfo) -> str:
    """The model's chat templates, one after the other; "" if it has none."""
    folder = Path(model.tokenizer_path or model.path)
    if not folder.is_dir():
        return ""
    found = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jinja"))]
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            given = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template") or ""
            found += [given] if isinstance(given, str) else [one["template"] for one in given]
    return "\n".join(found)


def choose_format(wanted: str, known: Mapping[str, ToolFormat], template: str) -> ToolFormat | None:
    """None: "auto" found none. Raises ConfigError for a name that is not known."""
    if wanted != "auto":
        return _named("parser", wanted, known)
    return next((one for one in known.values() if one.recognises(template)), None)


def choose_reasoning(wanted: str, known: Mapping[str, ReasoningTags], template: str) -> ReasoningTags | None:
    """None: it does not mark any."""
    if wanted == "none":
        return None
    if wanted != "auto":
        return _named("reasoning_parser", wanted, known)
    return next((tags for tags in known.values() if tags[0] in template or tags[1] in template), None)


def _named(key: str, wanted: str, known: Mapping[str, T]) -> T:
    if wanted not in known:
        raise ConfigError(f"plugins.tool_calling.{key} = {wanted!r} is not known; there are: auto, {', '.join(sorted(known))}")
    return known[wanted]
