"""Which tokens end a completion of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from kernel_core.api import ModelInfo


def find_eos_ids(model: ModelInfo, tokenizer_path: Path, tokenizer: Tokenizer) -> frozenset[int]:
    """Everything that generation_config.json, config.json and tokenizer_config.json call an end token."""
    given = [model.generation.get("eos_token_id"), model.config.get("eos_token_id")]
    given += [(model.config.get("text_config") or {}).get("eos_token_id")]
    ids = {token for value in given for token in _ids(value)}
    named = _tokenizer_eos(tokenizer_path)
    own = tokenizer.token_to_id(named) if named else None
    return frozenset(ids | {own} - {None})


def _ids(value: Any) -> Iterator[int]:
    if isinstance(value, int):
        yield value
    elif value is not None:
        yield from value


def _tokenizer_eos(path: Path) -> str | None:
    file = path / "tokenizer_config.json"
    if not file.is_file():
        return None
    token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    return token["content"] if isinstance(token, dict) else token
