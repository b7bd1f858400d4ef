"""Stop ids of all requests in one table by token: a step looks its tokens up at once, and asks the request only on a hit."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


class StopTable:
    """counts[t]: requests that token t may end. The last entry is always 0 and stands for all greater tokens."""

    def __init__(self) -> None:
        self._counts = np.zeros(1024, np.int32)
        self.size = 0  # how many (request, stop id) pairs there are; 0: nothing to look up

    def add(self, ids: Iterable[int]) -> None:
        for token in ids:
            if token >= self._counts.size - 1:
                self._counts = np.concatenate([self._counts, np.zeros(token + 2, np.int32)])
            self._counts[token] += 1
            self.size += 1

    def remove(self, ids: Iterable[int]) -> None:
        for token in ids:
            self._counts[token] -= 1
            self.size -= 1

    def hits(self, tokens: np.ndarray) -> list[int]:
        """Indices of tokens that are some request's stop id, ascending."""
        return self._counts.take(tokens, mode="clip").nonzero()[0].tolist()
