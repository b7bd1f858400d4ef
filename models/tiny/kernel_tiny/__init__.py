"""The embedded checkpoints. Importing this reads no weights and needs no torch."""

from __future__ import annotations

from pathlib import Path

__all__ = ["functions", "tiny_chat", "tiny_chat_eagle", "tiny_chat_eagle3", "tiny_chat_mlp", "tiny_draft"]
_HERE = Path(__file__).resolve().parent


def tiny_chat() -> Path:
    """The folder of the chat model, in Hugging Face format."""
    return _HERE / "tiny-chat"


def tiny_draft() -> Path:
    """The folder of the draft model: the same tokenizer, a fifth of the parameters."""
    return _HERE / "tiny-draft"


def tiny_chat_eagle() -> Path:
    """The folder of the chat model's EAGLE-1 head: no tokenizer, no embedding and no head of its own."""
    return _HERE / "tiny-chat-eagle"


def tiny_chat_eagle3() -> Path:
    """The folder of the chat model's EAGLE-3 head, with a smaller vocabulary of its own."""
    return _HERE / "tiny-chat-eagle3"


def tiny_chat_mlp() -> Path:
    """The folder of the chat model's MLP speculator."""
    return _HERE / "tiny-chat-mlp"


def functions() -> Path:
    """The JSON file of what was taught: name, signature, first docstring line, parameters, how many are required."""
    return _HERE / "functions.json"
