"""Idle blocks, least recently used first."""

from __future__ import annotations

from collections import deque

import numpy as np


class IdleBlocks:
    """A queue of batches. A block that is used again stays in its batch and is passed over there, so that every event costs
    O(1) per block; when passed-over places outnumber the blocks there are, the queue is rewritten."""

    def __init__(self, num_blocks: int) -> None:
        self.size = 0
        self._since = np.zeros(num_blocks, np.int64)  # number of the batch in which the block is idle, 0: in none
        self._batches: deque[tuple[int, np.ndarray]] = deque()
        self._number = self._places = 0

    def add(self, ids: np.ndarray) -> None:
        """Blocks become idle; of these the first is evicted first."""
        self._number += 1
        self._since[ids] = self._number
        self._batches.append((self._number, ids))
        self.size += ids.size
        self._places += ids.size
        if self._places > 2 * self._since.size:
            self._rewrite()

    def remove(self, ids: np.ndarray) -> None:
        """Those of the blocks that are idle are so no longer."""
        self.size -= int(np.count_nonzero(self._since[ids]))
        self._since[ids] = 0

    def take(self, count: int) -> np.ndarray:
        """The `count` blocks that have been idle longest. Raises IndexError when there are fewer."""
        found = []
        while count:
            number, ids = self._batches.popleft()
            valid = ids[self._since[ids] == number]
            self._places -= ids.size
            if valid.size > count:
                self._batches.appendleft((number, valid[count:]))
                self._places += valid.size - count
                valid = valid[:count]
            self._since[valid] = 0
            self.size -= valid.size
            count -= valid.size
            found.append(valid)
        return np.concatenate(found) if found else np.zeros(0, np.int32)

    def _rewrite(self) -> None:
        batches = ((number, ids[self._since[ids] == number]) for number, ids in self._batches)
        self._batches = deque((number, ids) for number, ids in batches if ids.size)
        self._places = self.size
