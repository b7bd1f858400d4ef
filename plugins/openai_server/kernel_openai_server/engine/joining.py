"""Short steps that go out together: those that only bring tokens, one for each of the same sequences, become one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernel_core.api import Updates

MOST = 64  # steps that are joined


@dataclass(frozen=True, slots=True)
class Steady:
    """Each of these sequences got tokens[:, i], and nothing else happened."""

    requests: tuple[str, ...]
    tokens: np.ndarray  # int32 [steps, len(requests)]

    def take(self, rows: np.ndarray) -> Steady:
        """The same for some sequences only."""
        return Steady(tuple(self.requests[row] for row in rows.tolist()), self.tokens[:, rows])

    def updates(self) -> Updates:
        """As one step that brought several tokens."""
        steps, count = self.tokens.shape
        running = np.zeros(count, np.int32)
        offsets = np.arange(0, self.tokens.size + 1, steps, dtype=np.int32)
        return Updates(self.requests, self.tokens.T.ravel(), offsets, running, running - 1)


class Joiner:
    """Collects the steps of a message. The engine names the same sequences by the same tuple as long as they run together.
    Tokens are copied at once: keeping the arrays of many steps would cost the engine's loop more than the copies, because
    memory would not be used again while it is in the caches."""

    def __init__(self) -> None:
        self.urgent = False  # is there more than tokens of sequences that go on?
        self._done: list[Updates | Steady] = []
        self._requests: tuple[str, ...] = ()  # of the steps that are being joined
        self._tokens = np.empty((0, 0), np.int32)  # [steps, requests]
        self._count = 0

    def add(self, updates: Updates) -> None:
        """Rate: once per step."""
        if updates.requests is self._requests and self._count < MOST and _steady(updates):
            self._tokens[self._count] = updates.tokens
            self._count += 1
        else:
            self._begin(updates)

    def _begin(self, updates: Updates) -> None:
        self._end()
        if not _steady(updates):
            self.urgent = True
            self._done.append(updates)
            return
        if self._tokens.shape[1] != updates.tokens.size:
            self._tokens = np.empty((MOST, updates.tokens.size), np.int32)
        self._tokens[0], self._count, self._requests = updates.tokens, 1, updates.requests

    def take(self) -> list[Updates | Steady]:
        """What was added since the last time. Rate: once per message."""
        self._end()
        done, self._done, self.urgent = self._done, [], False
        return done

    def _end(self) -> None:
        if self._count:
            self._done.append(Steady(self._requests, self._tokens[: self._count].copy()))
        self._requests, self._count = (), 0


def _steady(updates: Updates) -> bool:
    """Did each sequence get one token, and nothing else happen? Who did not end is named because of its tokens: where nobody
    ended and there are as many tokens as names, each got one. Makes no arrays, which would cost more than the look."""
    return (
        updates.tokens.size == len(updates.requests) > 0
        and not np.count_nonzero(updates.finish)
        and updates.logprobs is updates.prompt_logprobs is updates.drafted is None
        and not (updates.cached or updates.outputs or updates.errors)
    )
