"""Tokens to text, a few at a time. Both classes give the same text whatever the sizes of the pushes, show nothing of the
prompt, and hold back a character until its last byte is there."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
CONTEXT = 8  # prompt tokens that a window decoder sees before the first new one
LONGEST_PARTIAL = 5  # so many tokens without a complete character are broken for good


class Detokeniser(Protocol):
    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete. Rate: once per step and completion."""
        ...

    def flush(self) -> str:
        """Complete characters that were held back. An incomplete one is dropped."""
        ...


def _byte_of_letter() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable letter; this is the way back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """The bytes that each token of a byte-level tokenizer stands for, looked up once per token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._letters = _byte_of_letter()
        self._added = tokenizer.get_added_tokens_decoder()
        self._tables: dict[bool, dict[int, bytes]] = {True: {}, False: {}}

    def join(self, token_ids: Sequence[int], skip_special_tokens: bool) -> bytes:
        table = self._tables[skip_special_tokens]
        try:
            return b"".join([table[token] for token in token_ids])
        except KeyError:
            table.update((token, self._bytes(token, skip_special_tokens)) for token in token_ids if token not in table)
            return self.join(token_ids, skip_special_tokens)

    def _bytes(self, token: int, skip_special_tokens: bool) -> bytes:
        added = self._added.get(token)
        if added is not None:
            hidden = skip_special_tokens and added.special
            return b"" if hidden else self._tokenizer.decode([token], skip_special_tokens=False).encode()
        letters = self._tokenizer.id_to_token(token) or ""
        try:
            return bytes(map(self._letters.__getitem__, letters))
        except KeyError:
            return letters.encode()


class ByteDetokeniser:
    """For byte-level tokenizers: the tokens' bytes through an incremental UTF-8 decoder."""

    def __init__(self, table: TokenBytes, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._table, self._skip = table, skip_special_tokens
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self.push(prompt_ids[-4:])  # a character that the prompt leaves incomplete; what is complete is not ours

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decode(self._table.join(token_ids, self._skip))

    def flush(self) -> str:
        return ""


class WindowDetokeniser:
    """For every other tokenizer: decode the tokens since the last text came out, after a little context, and compare. Token by
    token, because some decoders show a whole run of bytes as broken while its last character is incomplete."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int], skip_special_tokens: bool) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._start_over(list(prompt_ids[-CONTEXT:]))

    def _start_over(self, context: list[int]) -> None:
        self._ids, self._context = context, len(context)
        self._before = self._text(context)

    def _text(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip)

    def _continuation(self, whole: str) -> str:
        """What `whole` adds to the context, whose last characters may have been broken ones that are complete now."""
        for known in (self._before, self._before.rstrip(BROKEN)):
            if whole.startswith(known):
                return whole[len(known) :]
        return self._text(self._ids[self._context :])

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push(token) for token in token_ids])

    def _push(self, token: int) -> str:
        self._ids.append(token)
        whole = self._text(self._ids)
        if whole.endswith(BROKEN) and len(self._ids) - self._context < LONGEST_PARTIAL:
            return ""
        new = self._continuation(whole)
        if new:
            self._start_over(self._ids[self._context :])
        return new

    def flush(self) -> str:
        return self._continuation(self._text(self._ids)).rstrip(BROKEN)
