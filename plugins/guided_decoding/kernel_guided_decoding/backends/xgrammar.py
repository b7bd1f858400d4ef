"""The library xgrammar: fast masks for context-free grammars. It passes over what it does not do, so JSON schemas and regular
expressions reach it rewritten into what it does exactly (`schemas`, `patterns`); the rest is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast
from xgrammar import BatchGrammarMatcher, Grammar, GrammarCompiler, GrammarMatcher, TokenizerInfo, VocabType

from kernel_core.api import RequestError
from kernel_guided_decoding.backends import Mark, Spacing, Tag, Unusable
from kernel_guided_decoding.patterns import Unsupported, text_pattern
from kernel_guided_decoding.schemas import MARKS, lowered

SPACING: Mapping[str, Mapping[str, Any]] = {
    "spaced": {"any_whitespace": False, "separators": (", ", ": ")},
    "compact": {"any_whitespace": False, "separators": (",", ":")},
    "flexible": {"any_whitespace": True},
}
#: of EBNF: a mark of `schemas`, or a text to pass over
MARKED = re.compile(r'\[\\U000([fF][0-9a-fA-F]{4})-\\U000[fF][0-9a-fA-F]{4}\]|"(?:[^"\\]|\\.)*"')
ELSEWHERE = 'or set plugins.guided_decoding.backend = "llguidance"'
#: in a Lark grammar: a pattern of its text → what it is called; xgrammar reads these in its own way, or not in full
LARK_REFUSED = {
    r"%(json|regex|lark)\b": "%json, %regex or %lark inside a grammar",
    r"(?m)^\s*[?!]*\w+\s*\[": "attributes of rules, as name[max_tokens=3]",
    r"\\[DWSuU]|\\x[89a-fA-F]": r"\D, \W, \S and characters by their number: write the characters out,",
}


class XGrammar:
    """Implements `Library`."""

    def choice(self, texts: Sequence[str]) -> str:
        ways = [{"type": "const_string", "value": text} for text in texts]
        return _made(Grammar.from_structural_tag, _tagged({"type": "or", "elements": ways}))

    def regex(self, pattern: str) -> str:
        try:
            written = text_pattern(pattern)
        except (Unsupported, re.error, RecursionError) as error:
            raise Unusable(f"this regex cannot be used: {error}; change it, {ELSEWHERE}") from error
        return _made(Grammar.from_ebnf, f"root ::= {_expression(written)}\n")

    def json_schema(self, schema: Any, spacing: Spacing) -> str:
        return _made(Grammar.from_ebnf, _rules(schema, spacing))

    def grammar(self, text: str) -> str:
        if "::=" in text:
            if re.search(r"\bRegex\s*\(", text):
                raise Unusable(f"Regex(...) in an EBNF grammar is not supported: write rules, {ELSEWHERE}")
            return _made(Grammar.from_ebnf, text)
        for found, what in LARK_REFUSED.items():
            if re.search(found, text):
                raise Unusable(f"{what} in a Lark grammar: not supported by xgrammar; change it, {ELSEWHERE}")
        return _made(Grammar.from_lark, text)

    def structural_tag(self, tags: Sequence[Tag], spacing: Spacing, mark: Mark) -> str:
        made = []
        for tag in tags:
            for text in (tag.trigger, tag.end):
                if mark(text) == "special":
                    raise Unusable(f"{text!r} is a special token, of which xgrammar sees no text: use other marks, {ELSEWHERE}")
            content = {"type": "grammar", "grammar": _rules(tag.schema, spacing)}
            made.append({"type": "tag", "begin": tag.begin, "content": content, "end": tag.end})
        triggers = sorted({tag.trigger for tag in tags})
        return _made(Grammar.from_structural_tag, _tagged({"type": "triggered_tags", "triggers": triggers, "tags": made}))

    def tokens(self, file: Path, vocab_size: int, ends: Sequence[int], threads: int) -> Tokens:
        try:
            return Tokens(TokenizerInfo(_texts(file, vocab_size), VocabType.RAW, stop_token_ids=list(ends)), threads)
        except Exception as error:  # whatever the two libraries say of a file that they cannot read
            raise RequestError(f"guided decoding is unavailable for this tokenizer: {error}") from error


BACKEND = XGrammar()


def _tagged(form: Mapping[str, Any]) -> str:
    return json.dumps({"type": "structural_tag", "format": form})


def _rules(schema: Any, spacing: Spacing) -> str:
    """A JSON schema as EBNF. xgrammar would drop the escapes from some patterns and expand others into rules with slow masks."""
    made, patterns = lowered(schema)
    try:
        written = str(Grammar.from_json_schema(json.dumps(made), strict_mode=False, **SPACING[spacing]))
    except RuntimeError as error:
        raise Unusable(_reason(error)) from error
    found: set[int] = set()

    def expression(place: re.Match[str]) -> str:
        if place[1] is None:
            return place[0]
        found.add(number := (int(place[1], 16) - MARKS) // 2)
        return _expression(patterns[number])

    written = MARKED.sub(expression, written)
    if patterns and not found:
        raise Unusable("this version of xgrammar writes schemas in a way that is not known: install one that the extra names")
    return written


def _expression(pattern: str) -> str:
    return f"Regex({json.dumps(pattern, ensure_ascii=False)})"


def _reason(error: RuntimeError) -> str:
    return re.sub(r"^\[[\d:]+\] \S+: ", "", str(error))


def _made(make: Callable[..., Grammar], *given: Any, **more: Any) -> str:
    try:
        return make(*given, **more).serialize_json()
    except RuntimeError as error:
        raise Unusable(_reason(error)) from error


def _texts(file: Path, vocab_size: int) -> list[bytes]:
    """What every token writes. Special tokens write nothing: they are no text, and an empty token is never allowed."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    known = TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=[0]).decoded_vocab
    texts = [bytes(text) for text in known]
    for number, token in tokenizer.added_tokens_decoder.items():
        if number < vocab_size:
            texts[number] = b"" if token.special else token.content.encode()
    return texts


class Tokens:
    """Implements `backends.Tokens`."""

    def __init__(self, info: TokenizerInfo, threads: int) -> None:
        self._compiler = GrammarCompiler(info, max_threads=1, cache_enabled=False)  # its caller has threads
        self._batch = BatchGrammarMatcher(threads)

    def compile(self, grammar: str) -> Matcher:
        try:
            return Matcher(GrammarMatcher(self._compiler.compile_grammar(Grammar.deserialize_json(grammar))))
        except RuntimeError as error:
            raise RequestError(f"the grammar cannot be compiled: {error}") from error

    def fill(self, matchers: Sequence[Matcher], rows: np.ndarray) -> Sequence[str]:
        """With the library's own threads."""
        try:
            self._batch.batch_fill_next_token_bitmask([matcher.inner for matcher in matchers], rows.view(np.int32))
        except RuntimeError:  # one by one, to see whose it is
            return [matcher.fill(row) for matcher, row in zip(matchers, rows)]
        return [""] * len(matchers)


class Matcher:
    """Implements `backends.Matcher`."""

    def __init__(self, inner: GrammarMatcher) -> None:
        self.inner = inner

    def copy(self) -> Matcher:
        return Matcher(self.inner.fork())

    def advance(self, tokens: Sequence[int]) -> str:
        wrong = next((token for token in tokens if not self.inner.accept_token(token)), None)
        return "" if wrong is None else f"token {wrong} does not follow the grammar"

    def try_advance(self, token: int) -> bool:
        return self.inner.accept_token(token)

    def rollback(self, count: int) -> None:
        self.inner.rollback(count)

    def fill(self, row: np.ndarray) -> str:
        try:
            self.inner.fill_next_token_bitmask(row.view(np.int32)[None])
        except RuntimeError as error:
            return str(error)
        return ""

    def accepting(self) -> bool:
        return self.inner.is_completed()
