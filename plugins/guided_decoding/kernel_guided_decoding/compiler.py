"""Compiles grammars for the model's tokenizer, in threads beside the loop, and keeps what it compiled."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from threading import Lock
from time import monotonic

from llguidance import LLMatcher, LLTokenizer

from kernel_core.api import ModelInfo, RequestError, decode
from kernel_guided_decoding import GuidedSection
from kernel_guided_decoding.request import Guide
from kernel_guided_decoding.sources import limits


class Compiling:
    """A LongJob: ends when the grammar is compiled, or the time for it is over."""

    def __init__(self, future: Future[LLMatcher], seconds: float) -> None:
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
        self.section, self.vocab_size = section, vocab_size
        self.file = Path(model.tokenizer_path or model.path) / "tokenizer.json"
        self._pool = ThreadPoolExecutor(section.threads, thread_name_prefix="guided_decoding")
        self._lock = Lock()
        self._tokenizer: LLTokenizer | None = None
        self._cache: OrderedDict[bytes, Future[LLMatcher]] = OrderedDict()

    def start(self, data: bytes) -> Compiling:
        """Begin to compile a payload's grammar, or find it. Rate: request."""
        future = self._cache.get(data)
        if future is None or future.cancelled() or (future.done() and future.exception() is not None):
            future = self._cache[data] = self._pool.submit(self._compile, data)
        self._cache.move_to_end(data)
        while len(self._cache) > self.section.cached:
            self._cache.popitem(last=False)
        return Compiling(future, self.section.compile_seconds)

    def matcher(self, data: bytes) -> LLMatcher:
        """A matcher of one's own, at its beginning. What left the cache meanwhile is compiled again. Rate: request. Raises
        RequestError."""
        self.start(data)
        return self._cache[data].result(self.section.compile_seconds).deep_copy()

    def _compile(self, data: bytes) -> LLMatcher:
        guide = decode(data, Guide)
        try:
            matcher = LLMatcher(self._load(guide.eos), guide.source, log_level=0, limits=limits())
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise RequestError(f"the grammar cannot be compiled: {error}") from error
        if matcher.is_error():
            raise RequestError(f"the grammar cannot be compiled: {' '.join(matcher.get_error().split())[:500]}")
        return matcher

    def _load(self, eos: list[int]) -> LLTokenizer:
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = load_tokenizer(self.file, self.vocab_size, eos)
            return self._tokenizer


def load_tokenizer(file: Path, vocab_size: int, eos: list[int]) -> LLTokenizer:
    """Raises RequestError for a tokenizer that the back end cannot use."""
    try:
        return LLTokenizer(file.read_text(encoding="utf-8"), n_vocab=vocab_size, eos_token=eos)
    except BaseException as error:
        if not isinstance(error, (OSError, ValueError)) and type(error).__name__ != "PanicException":
            raise
        raise RequestError(f"guided decoding is unavailable for this tokenizer: {error}") from error
