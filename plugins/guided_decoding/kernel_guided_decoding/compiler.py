"""Compiles grammars for the model's tokenizer, in threads beside the loop, and keeps what it compiled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from threading import Lock
from time import monotonic

import numpy as np

from kernel_core.api import ModelInfo, RequestError, decode
from kernel_guided_decoding import GuidedSection
from kernel_guided_decoding.backends import Matcher, Tokens, load
from kernel_guided_decoding.request import Guide


class Compiling:
    """A LongJob: ends when the grammar is compiled, or the time for it is over."""

    def __init__(self, future: Future[Matcher], seconds: float) -> None:
        self.future, self.seconds = future, seconds
        self.until = monotonic() + seconds

    def done(self, wait: float) -> bool:
        return bool(wait_for([self.future], wait).done) or monotonic() > self.until

    def finish(self) -> None:
        if not self.future.done():
            self.future.cancel()
            raise RequestError(f"the grammar took longer than {self.seconds:g} s to compile (plugins.guided_decoding)")
        self.future.result()


class Compiler:
    """Matchers at their beginning, by the request's payload. `start` and `matcher` belong to the worker's thread."""

    def __init__(self, section: GuidedSection, model: ModelInfo, vocab_size: int) -> None:
        self.section, self.vocab_size, self.library = section, vocab_size, load(section.backend)
        self.file = Path(model.tokenizer_path or model.path) / "tokenizer.json"
        self._pool = ThreadPoolExecutor(section.threads, thread_name_prefix="guided_decoding")
        self._lock = Lock()
        self._tokens: Tokens | None = None
        self._cache: OrderedDict[bytes, Future[Matcher]] = OrderedDict()

    def start(self, data: bytes) -> Compiling:
        """Begin to compile a payload's grammar, or find it. Rate: request."""
        future = self._cache.get(data)
        if future is None or future.cancelled() or (future.done() and future.exception() is not None):
            future = self._cache[data] = self._pool.submit(self._compile, data)
        self._cache.move_to_end(data)
        while len(self._cache) > self.section.cached:
            self._cache.popitem(last=False)
        return Compiling(future, self.section.compile_seconds)

    def matcher(self, data: bytes) -> Matcher:
        """A matcher of one's own, at its beginning. What left the cache meanwhile is compiled again. Rate: request. Raises
        RequestError."""
        self.start(data)
        return self._cache[data].result(self.section.compile_seconds).copy()

    def fill(self, matchers: Sequence[Matcher], rows: np.ndarray) -> Sequence[str]:
        """Mask rows [n, ceil(V / 32)] of matchers, in parallel → what went wrong, "" where nothing did. Rate: step."""
        assert self._tokens is not None  # a matcher came from it
        return self._tokens.fill(matchers, rows)

    def _compile(self, data: bytes) -> Matcher:
        guide = decode(data, Guide)
        return self._load(guide.eos).compile(guide.source)

    def _load(self, ends: list[int]) -> Tokens:
        with self._lock:
            if self._tokens is None:
                self._tokens = self.library.tokens(self.file, self.vocab_size, ends, self.section.threads)
            return self._tokens
