"""What a library of grammars has to do for this plugin. A further one is a module here with a `Library`, its name in
`GuidedSection.backend`, and an extra of the distribution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from kernel_core.api import PluginError, RequestError

Spacing = Literal["spaced", "compact", "flexible"]
Mark = Callable[[str], Literal["text", "token", "special"]]  # what the model's tokenizer makes of a text: one token, or several


class Unusable(RequestError):
    """A grammar, or a part of one, that cannot be honoured exactly; the text says which and what to do."""

    def __init__(self, what: object) -> None:
        super().__init__(f"structured_outputs: {' '.join(str(what).split())[:500]}")


@dataclass(frozen=True, slots=True)
class Tag:
    """A part of free text: once `trigger` is written, `begin` (which it begins), JSON of the schema, and `end` follow."""

    trigger: str
    begin: str
    schema: Any
    end: str


class Matcher(Protocol):
    """A place in a compiled grammar. Belongs to one thread at a time."""

    def copy(self) -> Matcher:
        """One of its own at the same place. Any thread. Rate: request."""
        ...

    def advance(self, tokens: Sequence[int]) -> str:
        """Over tokens that were sampled → what went wrong, or "". After that it is not used again. Rate: step."""
        ...

    def try_advance(self, token: int) -> bool:
        """Over a draft; False: the grammar refuses it, and the place is unchanged. Rate: step and draft."""
        ...

    def rollback(self, count: int) -> None:
        """Back over so many tokens. Rate: step, after drafts."""
        ...

    def fill(self, row: np.ndarray) -> str:
        """The tokens that may come next into `row` [ceil(V / 32)] uint32, end tokens where the grammar accepts → what went
        wrong, or "". Rate: step, and draft."""
        ...

    def accepting(self) -> bool:
        """Whether the text so far is whole. Rate: step, and draft."""
        ...


class Tokens(Protocol):
    """A library prepared for one tokenizer, in the worker."""

    def compile(self, grammar: str) -> Matcher:
        """A matcher at its beginning. In a thread beside the loop, several at once. Raises RequestError."""
        ...

    def fill(self, matchers: Sequence[Any], rows: np.ndarray) -> Sequence[str]:
        """`Matcher.fill` of matchers of this library into `rows` [n, ceil(V / 32)], in parallel. Rate: step."""
        ...


class Library(Protocol):
    """In the face: from what a user gave to a grammar as text, checked. All methods raise `Unusable` or another RequestError
    naming what cannot be honoured exactly, ValueError, TypeError, KeyError or RecursionError for what cannot be read. Any
    thread. Rate: request."""

    def choice(self, texts: Sequence[str]) -> str: ...
    def regex(self, pattern: str) -> str: ...
    def json_schema(self, schema: Any, spacing: Spacing) -> str: ...
    def grammar(self, text: str) -> str: ...
    def structural_tag(self, tags: Sequence[Tag], spacing: Spacing, mark: Mark) -> str: ...
    def tokens(self, file: Path, vocab_size: int, ends: Sequence[int], threads: int) -> Tokens:
        """In the worker, for a tokenizer.json; `ends`: the model's end tokens. Raises RequestError for a tokenizer that cannot
        be used. Rate: once."""
        ...


def load(name: str) -> Library:
    """Raises PluginError when its library is not installed. Rate: at build."""
    try:
        return import_module(f"{__name__}.{name}").BACKEND
    except ImportError as error:
        raise PluginError(
            f"plugins.guided_decoding.backend is {name!r}, and it cannot be imported ({error}). Install it with:"
            f" pip install 'kernel-guided-decoding[{name}]', or leave the key out"
        ) from error
