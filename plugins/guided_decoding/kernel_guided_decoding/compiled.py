"""Compiled grammars of one worker: made in a thread, kept, and copied for every slot."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from pathlib import Path

from llguidance import LLMatcher, LLTokenizer

from kernel_core.api import BuildContext, decode
from kernel_guided_decoding.request import Guide

SHARED = "grammars"


class Compiling:
    """A `LongJob`: the ack of the job opens the gate of the requests that wait for this grammar."""

    def __init__(self, future: Future[LLMatcher], seconds: float) -> None:
        self._future, self._seconds = future, seconds
        self._until = time.monotonic() + seconds

    def done(self, wait_seconds: float) -> bool:
        wait([self._future], timeout=wait_seconds)
        return self._future.done() or time.monotonic() > self._until

    def finish(self) -> None:
        if not self._future.done():
            raise TimeoutError(
                f"the grammar took longer than {self._seconds:g} s to compile (plugins.guided_decoding.compile_seconds)"
            )
        self._future.result()


class Grammars:
    """Of one worker. `job` runs in the worker's thread between two steps, compiling in two of its own."""

    def __init__(self, context: BuildContext) -> None:
        self._section, self._model, self._tokenizer_path = context.section, context.model, context.config.tokenizer
        config = context.model.config
        self.vocab_size = int(config.get("vocab_size") or (config.get("text_config") or {})["vocab_size"])
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock, self._tokenizer_lock = threading.Lock(), threading.Lock()
        self._ends: tuple[int, ...] = ()

    @cached_property
    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(2, "grammar")

    def job(self, data: bytes) -> Compiling | None:
        """Compile a `Guide` unless it is there."""
        guide = decode(data, Guide)
        if self._find(guide.key) is not None:
            return None
        return Compiling(self._threads.submit(self._compile, guide), self._section.compile_seconds)

    def matcher(self, guide: Guide) -> LLMatcher:
        """At the beginning of the grammar; a copy of the caller's own."""
        return (self._find(guide.key) or self._compile(guide)).deep_copy()

    def _find(self, key: str) -> LLMatcher | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _compile(self, guide: Guide) -> LLMatcher:
        """Raises ValueError for a grammar that this tokenizer cannot write, RuntimeError where the tokenizer is not usable."""
        compiled = LLMatcher(self._tokenizer(guide.ends), guide.grammar)
        if compiled.is_error():
            raise ValueError(compiled.get_error())
        with self._lock:
            self._kept[guide.key] = compiled
            while len(self._kept) > self._section.cached:
                self._kept.popitem(last=False)
        return compiled

    def _tokenizer(self, ends: tuple[int, ...]) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._ends != ends:
                self._made, self._ends = self._make_tokenizer(ends), ends
            return self._made

    def _make_tokenizer(self, ends: tuple[int, ...]) -> LLTokenizer:
        try:
            return LLTokenizer(self._tokenizer_json(), n_vocab=self.vocab_size, eos_token=list(ends))
        except BaseException as error:  # the library panics on some vocabularies, which is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise RuntimeError(f"structured outputs are not available for this model's tokenizer: {error}") from None

    def _tokenizer_json(self) -> str:
        folder = Path(self._tokenizer_path or self._model.path)
        file = folder / "tokenizer.json"
        if file.is_file():
            return json.dumps(json.loads(file.read_text()) | {"padding": None, "truncation": None})
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str()


def grammars_of(context: BuildContext) -> Grammars:
    """One for all hooks of the worker part."""
    if SHARED not in context.shared:
        context.shared[SHARED] = Grammars(context)
    return context.shared[SHARED]
