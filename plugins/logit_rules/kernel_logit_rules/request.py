"""The request fields, their checks, and the rules in tokens as they cross to the worker."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field

from kernel_core.api import BuildContext, Prepared, RequestError, TextCodec, encode


class RuleFields(BaseModel):
    """All off by default."""

    allowed_token_ids: list[int] | None = Field(None, min_length=1, description="only these tokens may be generated")
    bad_words: list[str] | None = Field(None, description="words the output may not contain")
    min_tokens: int = Field(0, ge=0, description="no end token and no stop token id before this many tokens")
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        None, description="token id to a number in [-100, 100] that is added to its logit"
    )


@dataclass(frozen=True, slots=True)
class Rules:
    """One request's rules in tokens; empty arrays are off. `bad` are token sequences, `until` the number of output tokens
    before which `stops` are masked."""

    allowed: np.ndarray
    bad: list[np.ndarray]
    until: int
    stops: np.ndarray
    bias_ids: np.ndarray
    bias: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))


def _ids(values: Iterable[int]) -> np.ndarray:
    return np.unique(np.fromiter(values, np.int64)).astype(np.int32)


class Preparer:
    """Checks a request's rules and sends them in tokens."""

    def __init__(self, context: BuildContext) -> None:
        self.plugin = context.plugin
        self.text: TextCodec = context.service("text/1")
        config = context.model.config
        self.vocab_size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
        end = context.model.generation.get("eos_token_id", config.get("eos_token_id"))
        end = [end] if isinstance(end, int) else end or []
        self.end_ids = frozenset(end) | self.text.eos_ids

    def prepare(self, request: Prepared) -> None:
        given = RuleFields(**request.fields)
        if given == RuleFields():
            return
        params = request.params
        if params.max_tokens is not None and given.min_tokens > params.max_tokens:
            raise RequestError(f"min_tokens = {given.min_tokens} is more than max_tokens = {params.max_tokens}")
        bias = dict(sorted((given.logit_bias or {}).items()))
        self._in_vocabulary("allowed_token_ids", given.allowed_token_ids or ())
        self._in_vocabulary("logit_bias", bias)
        stops = set(params.stop_token_ids or ()) | (set() if params.ignore_eos else self.end_ids)
        rules = Rules(
            allowed=_ids(given.allowed_token_ids or ()),
            bad=self._sequences(given.bad_words or ()),
            until=given.min_tokens,
            stops=_ids(t for t in stops if given.min_tokens and 0 <= t < self.vocab_size),
            bias_ids=_ids(bias),
            bias=np.array(list(bias.values()), np.float32),
        )
        request.payloads[self.plugin] = encode(rules)

    def _in_vocabulary(self, name: str, ids: Iterable[int]) -> None:
        wrong = [t for t in ids if not 0 <= t < self.vocab_size]
        if wrong:
            raise RequestError(f"{name} contains {wrong[:5]}, but the model's token ids are 0 to {self.vocab_size - 1}")

    def _sequences(self, words: Sequence[str]) -> list[np.ndarray]:
        """Every word as it is tokenised at the start of a text and after a space, if the model can write it: a tokenizer may have
        tokens that it has not."""
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            if not word.strip():
                raise RequestError("bad_words must not contain an empty word")
            for text in (word, " " + word.lstrip()):
                found[tuple(self.text.encode(text, add_special_tokens=False))] = None
        return [np.array(ids, np.int32) for ids in found if ids and max(ids) < self.vocab_size]
