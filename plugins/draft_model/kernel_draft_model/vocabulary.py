"""Draft and target must mean the same by a token id."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kernel_core.api import ConfigError, ModelInfo

TOKENIZER = "tokenizer.json"


def check_vocabulary(draft: ModelInfo, target: ModelInfo) -> None:
    """Raises ConfigError unless both vocabularies have one size and, where both checkpoints come with a tokenizer.json, the
    same ids for the same tokens."""
    sizes = [(info.config.get("text_config") or info.config).get("vocab_size") for info in (draft, target)]
    if sizes[0] != sizes[1]:
        raise ConfigError(
            f"the draft model {draft.path} has a vocabulary of {sizes[0]} tokens, the target one of {sizes[1]}: a draft model "
            "must share the target's vocabulary; take one of the same family"
        )
    files = [Path(info.tokenizer_path or info.path) / TOKENIZER for info in (draft, target)]
    if not all(file.is_file() for file in files):
        return
    if files[0].read_bytes() != files[1].read_bytes() and _tokens(files[0]) != _tokens(files[1]):
        raise ConfigError(
            f"the draft model {draft.path} and the target {target.path} give the same ids to different tokens "
            f"({TOKENIZER} differs): a draft model must share the target's vocabulary; take one of the same family"
        )


def _tokens(file: Path) -> dict[str, int]:
    """Every token of a tokenizer.json with its id."""
    read: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    vocab = read["model"]["vocab"]
    if not isinstance(vocab, dict):  # a list of (token, score)
        vocab = {token: number for number, (token, _) in enumerate(vocab)}
    return vocab | {added["content"]: added["id"] for added in read.get("added_tokens", ())}
