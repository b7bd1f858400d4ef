"""The back ends without a model: grammars of one tokenizer, and texts of tokens that are drawn at random from their masks."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest

needs_xgrammar = pytest.mark.skipif(importlib.util.find_spec("xgrammar") is None, reason="xgrammar is not installed")
BOTH = ["llguidance", pytest.param("xgrammar", marks=needs_xgrammar)]
MARKS = {"<tool_call>": "token", "<|user|>": "special"}


@cache
def tokenizer():
    """(tokenizer.json, its tokenizer, end tokens, vocabulary size)"""
    from tokenizers import Tokenizer

    folder = Path(str(files("kernel_tiny"))) / "tiny-chat"
    config = json.loads((folder / "config.json").read_text())
    file = folder / "tokenizer.json"
    return file, Tokenizer.from_file(str(file)), np.atleast_1d(config["eos_token_id"]).tolist(), config["vocab_size"]


@cache
def tokens(backend: str):
    from kernel_guided_decoding.backends import load

    file, _, ends, size = tokenizer()
    return load(backend).tokens(file, size, ends, 2)


def source(backend: str, kind: str, value, spacing="spaced", most=1 << 18) -> str:
    from kernel_guided_decoding.backends import load
    from kernel_guided_decoding.sources import source

    return source(load(backend), kind, value, spacing, most, lambda text: MARKS.get(text, "text"))


def matcher(backend: str, kind: str, value, spacing="spaced"):
    return tokens(backend).compile(source(backend, kind, value, spacing))


def allowed(matcher) -> np.ndarray:
    size = tokenizer()[3]
    row = np.zeros((size + 31) // 32, np.uint32)
    assert matcher.fill(row) == ""
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[:size])


def accepts(backend: str, kind: str, value, text: str, spacing="spaced") -> bool:
    found = matcher(backend, kind, value, spacing)
    return all(found.try_advance(token) for token in tokenizer()[1].encode(text).ids) and found.accepting()


def walk(matcher, draw: np.random.Generator, most: int = 200, beside=None) -> str | None:
    """Tokens are drawn evenly, half of them from the first 600, which are letters; None: it did not end. `beside` is told every
    token before the matcher."""
    _, names, ends, _ = tokenizer()
    out: list[int] = []
    for _ in range(most):
        choice = allowed(matcher)
        if choice[0] < 600 and draw.random() < 0.5:
            choice = choice[choice < 600]
        if set(ends) & set(choice.tolist()) and draw.random() < 0.4:
            return names.decode(out, skip_special_tokens=False)
        token = int(draw.choice(choice))
        if token in ends:
            return names.decode(out, skip_special_tokens=False)
        if beside is not None:
            beside(out, token)
        assert matcher.advance([token]) == ""
        out.append(token)
    return None


def ended(backend: str, schema, walks: int) -> int:
    """How many walks ended; each of these is valid."""
    draw, first = np.random.default_rng(1), matcher(backend, "json_schema", schema)
    texts = [text for text in (walk(first.copy(), draw) for _ in range(walks)) if text is not None]
    for text in texts:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    return len(texts)
