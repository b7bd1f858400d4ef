"""What the draft model's tokens are in the target's vocabulary.

Vocabularies that differ in some tokens (or in all ids) are joined by the text of their tokens: what both have can be drafted.
That is the token-level intersection of https://arxiv.org/abs/2502.05202, with every id of the context translated alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernel_core.api import ConfigError, ModelInfo

TOKENIZER = "tokenizer.json"
#: GPT-2's visible stand-ins for bytes, in which byte-level tokenizers spell their tokens
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + n): byte for n, byte in enumerate(_HIDDEN)}


@dataclass(frozen=True, slots=True)
class Translation:
    """All int64: `reads` [target's V] is the draft model's token for each of the target's; the draft model's tokens `said` [n]
    are `meant` [n] in the target's vocabulary, its others are never drafted."""

    reads: Tensor
    said: Tensor
    meant: Tensor

    def logits(self, logits: Tensor) -> Tensor:
        """[N, V of the draft model] → [N, V of the target], -inf for tokens that the draft model lacks. Rate: graph."""
        out = logits.new_full((len(logits), len(self.reads)), float("-inf"))
        return out.index_copy_(1, self.meant, logits[:, self.said])


def translation(draft: ModelInfo, target: ModelInfo, heterogeneous: bool, device: torch.device) -> Translation | None:
    """None where ids mean the same and the sizes agree, so far as the checkpoints tell. Of two sizes of one vocabulary (padding)
    the smaller part is used. Raises ConfigError when ids mean different tokens and `heterogeneous` does not allow it."""
    sizes = tuple(int((info.config.get("text_config") or info.config)["vocab_size"]) for info in (draft, target))
    files = [Path(info.tokenizer_path or info.path) / TOKENIZER for info in (draft, target)]
    known = all(file.is_file() for file in files)
    if known and files[0].read_bytes() != files[1].read_bytes():
        read = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        tokens = [_tokens(one) for one in read]
        if tokens[0] != tokens[1]:
            _refuse(draft, target, heterogeneous)
            texts = [_texts(one, ids) for one, ids in zip(read, tokens)]
            return _by_text(*texts, sizes, device)
    if sizes[0] == sizes[1]:
        return None
    if not known:
        raise ConfigError(
            f"the draft model {draft.path} has a vocabulary of {sizes[0]} tokens, the target {target.path} one of {sizes[1]}, "
            f"and without a {TOKENIZER} in both nothing says which tokens they share: add the files, or take a draft model of "
            "the same family"
        )
    both = torch.arange(min(sizes), device=device)
    return Translation(torch.arange(sizes[1], device=device).clamp(max=sizes[0] - 1), both, both)


def _refuse(draft: ModelInfo, target: ModelInfo, heterogeneous: bool) -> None:
    if not heterogeneous:
        raise ConfigError(
            f"the draft model {draft.path} and the target {target.path} give the same ids to different tokens ({TOKENIZER} "
            "differs): take a draft model of the same family, or set plugins.draft_model.heterogeneous_vocabulary = true to "
            "draft the tokens that both have"
        )


def _tokens(read: dict[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json with its id."""
    vocab = read["model"]["vocab"]
    if not isinstance(vocab, dict):  # a list of (token, score)
        vocab = {token: number for number, (token, _) in enumerate(vocab)}
    return vocab | {added["content"]: added["id"] for added in read.get("added_tokens", ())}


def _texts(read: dict[str, Any], tokens: dict[str, int]) -> dict[bytes, int]:
    """The same by what a token stands for, whichever way its tokenizer spells bytes and spaces."""
    added = {one["content"] for one in read.get("added_tokens", ())}
    byte_level = "ByteLevel" in json.dumps(read.get("decoder"))
    return {token.encode() if token in added else _text(token, byte_level): number for token, number in tokens.items()}


def _text(token: str, byte_level: bool) -> bytes:
    if byte_level:
        return bytes(_BYTES[char] for char in token) if _BYTES.keys() >= set(token) else token.encode()
    if len(token) == 6 and token.startswith("<0x"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


def _by_text(draft: dict[bytes, int], target: dict[bytes, int], sizes: tuple[int, ...], device: torch.device) -> Translation:
    shared = [(draft[text], number) for text, number in target.items() if text in draft]
    shared = [(mine, theirs) for mine, theirs in shared if mine < sizes[0] and theirs < sizes[1]]
    if not shared:
        raise ConfigError("the draft model and the target have no token in common: take a draft model of the same family")
    reads = torch.zeros(sizes[1], dtype=torch.int64)
    for text, number in target.items():
        if number < sizes[1]:
            reads[number] = _ending(text, draft)
    said, meant = torch.tensor(shared).T
    return Translation(reads.to(device), said.to(device), meant.to(device))


def _ending(text: bytes, draft: dict[bytes, int]) -> int:
    """The token of the longest end of a text that the draft model has one for: the next token depends on that most."""
    return next((draft[text[start:]] for start in range(len(text)) if text[start:] in draft), 0)
