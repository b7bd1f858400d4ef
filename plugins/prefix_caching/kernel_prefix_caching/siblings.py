"""Kept blocks that continue the same tokens and begin alike: candidates for a copy of their first tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class Siblings:
    """A linked list of blocks per key (what comes before them, and their first tokens), newest first: O(1) per event.

    A block that is no longer kept stays in its list until it is put into another one; whoever asks has to look."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.tokens = np.zeros((num_blocks, block_size), np.int32)  # by block, written when it is kept
        self._newest: dict[bytes, int] = {}
        self._keys = [b""] * num_blocks
        self._older: dict[int, int] = {}  # of blocks that have siblings
        self._newer: dict[int, int] = {}

    def put(self, key: bytes, block: int) -> None:
        """The block is kept under this key from now on; an empty key is no list."""
        if self._keys[block]:
            self._remove(self._keys[block], block)
        self._keys[block] = key
        if key:
            older = self._newest.get(key)
            self._newest[key] = block
            if older is not None:
                self._older[block], self._newer[older] = older, block

    def _remove(self, key: bytes, block: int) -> None:
        older, newer = self._older.pop(block, 0), self._newer.pop(block, 0)
        if newer and older:
            self._older[newer], self._newer[older] = older, newer
        elif newer:
            del self._older[newer]
        elif older:
            self._newest[key] = older
            del self._newer[older]
        else:
            del self._newest[key]

    def __contains__(self, key: bytes) -> bool:
        return key in self._newest

    def closest(self, key: bytes, tokens: np.ndarray, kept: Sequence[object], most: int) -> tuple[int, int]:
        """The block under a key that begins with most of these tokens, and with how many; (0, 0): none. Only the newest `most`
        are looked at, and of these the ones that are `kept` (by block, None: not)."""
        block, found = self._newest.get(key, 0), []
        while block and len(found) < most:
            found.append(block)
            block = self._older.get(block, 0)
        found = [block for block in found if kept[block] is not None]
        if not found:
            return 0, 0
        differs = np.ones((len(found), tokens.size + 1), np.bool_)
        differs[:, :-1] = self.tokens[found, : tokens.size] != tokens
        common = differs.argmax(1)
        best = int(common.argmax())
        return found[best], int(common[best])
