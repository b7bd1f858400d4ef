"""Log probabilities in the two styles of the API. Rate: request, or chunk of requests that ask for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kernel_core.api import Logprob, TextCodec
from kernel_openai_server.protocol.objects import ChatLogprobs, CompletionLogprobs, PromptLogprob, TokenLogprob, TopLogprob

LOWEST = -9999.0  # JSON has no infinity


def number(value: float) -> float:
    return max(value, LOWEST)


class LogprobWriter:
    """`top`: how many alternatives were asked for. `as_ids`: tokens are written "token_id:ID"."""

    def __init__(self, codec: TextCodec | None, top: int, as_ids: bool) -> None:
        self._codec, self._top, self._as_ids = codec, top, as_ids

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids or self._codec is None else self._codec.token(token)

    def _bytes(self, token: int) -> list[int]:
        return [] if self._codec is None else list(self._codec.token_bytes(token))

    def chat(self, ids: Sequence[int], entries: Sequence[Mapping[int, Logprob]]) -> ChatLogprobs:
        return ChatLogprobs([self._token(token, entry) for token, entry in zip(ids, entries)])

    def _token(self, token: int, entry: Mapping[int, Logprob]) -> TokenLogprob:
        top = [TopLogprob(self._name(t), number(entry[t].logprob), self._bytes(t)) for t in self._best(entry)]
        return TokenLogprob(self._name(token), number(entry[token].logprob), self._bytes(token), top)

    def _best(self, entry: Mapping[int, Logprob]) -> list[int]:
        """The most probable ones; the chosen token is among the entries even if it is none of them."""
        ranked = sorted(entry, key=lambda token: entry[token].rank or 0)
        return ranked if self._top == -1 else ranked[: self._top]

    def completion(
        self, ids: Sequence[int], entries: Sequence[Mapping[int, Logprob] | None], offset: int
    ) -> tuple[CompletionLogprobs, int]:
        """`offset`: characters before the first of these tokens. → also those after the last. The first token of a prompt has no
        entry."""
        found = CompletionLogprobs([], [], [], [])
        for token, entry in zip(ids, entries):
            found.tokens.append(self._name(token))
            found.token_logprobs.append(None if entry is None else number(entry[token].logprob))
            found.top_logprobs.append(None if entry is None else self._named(token, entry))
            found.text_offset.append(offset)
            offset += len(self._codec.token(token)) if self._codec is not None else 0
        return found, offset

    def _named(self, token: int, entry: Mapping[int, Logprob]) -> dict[str, float]:
        """The best ones and the chosen token."""
        return {self._name(t): number(entry[t].logprob) for t in dict.fromkeys((*self._best(entry), token))}


def prompt_logprobs(entries: Sequence[Mapping[int, Logprob] | None] | None) -> list[PromptLogprob | None]:
    """{token id: {"logprob", "rank", "decoded_token"}} for each prompt token; None for the first."""
    return [None if entry is None else {str(token): _entry(one) for token, one in entry.items()} for entry in entries or []]


def _entry(one: Logprob) -> dict[str, object]:
    return {"logprob": number(one.logprob), "rank": one.rank, "decoded_token": one.decoded_token}
