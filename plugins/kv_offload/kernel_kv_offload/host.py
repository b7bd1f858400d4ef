"""The first tier: blocks in host memory, least recently used first out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 64 << 20  # bytes that are allocated at a time
Name = tuple[int, bytes]


class HostTier:
    """`sizes`: bytes of a block of each KV group. Memory is taken in chunks when it is first needed, pinned where `pinned` says
    so, and never more than `limit` bytes of blocks are held."""

    def __init__(self, sizes: Sequence[int], limit: int, pinned: bool = False) -> None:
        self.sizes, self.limit, self.pinned, self.used = sizes, limit, pinned, 0
        self._rows: OrderedDict[Name, Tensor] = OrderedDict()
        self._free: list[list[Tensor]] = [[] for _ in sizes]

    def __contains__(self, name: Name) -> bool:
        return name in self._rows

    def names(self) -> list[Name]:
        return list(self._rows)

    def get(self, name: Name) -> Tensor | None:
        """uint8 [bytes of a block], valid until the next `put`; it is the most recently used one now."""
        row = self._rows.get(name)
        if row is not None:
            self._rows.move_to_end(name)
        return row

    def put(self, name: Name, data: Tensor) -> bool:
        """Copy a block in. False: there is no room; `pop` makes some."""
        size = self.sizes[name[0]]
        if self.used + size > self.limit:
            return False
        row = self._take(name[0])
        row.copy_(data)
        self._rows[name] = row
        self.used += size
        return True

    def pop(self) -> tuple[Name, Tensor] | None:
        """Give up the least recently used block: its row may be written again at the next `put`."""
        if not self._rows:
            return None
        name, row = self._rows.popitem(last=False)
        self._free[name[0]].append(row)
        self.used -= self.sizes[name[0]]
        return name, row

    def _take(self, group: int) -> Tensor:
        if not self._free[group]:
            size = self.sizes[group]
            count = max(min(CHUNK, self.limit - self.used) // size, 1)
            chunk = torch.empty(count, size, dtype=torch.uint8, pin_memory=self.pinned)
            self._free[group] = list(chunk)
        return self._free[group].pop()
