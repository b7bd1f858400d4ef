"""A histogram whose values come one by one or as an array."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np


class Histogram:
    """`counts[i]` values are at most `bounds[i]` and more than the bound before; the last count has no bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._array = list(bounds), np.asarray(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times

    def observe_each(self, values: np.ndarray, times: np.ndarray) -> None:
        """values[i], times[i] times."""
        if not len(values):
            return
        self.sum += float(values @ times)
        found = np.bincount(self._array.searchsorted(values), times)
        for place in np.flatnonzero(found):
            self.counts[place] += int(found[place])

    def add(self, total: float, counts: Sequence[int]) -> None:
        """What another histogram with the same bounds counted."""
        self.sum += total
        for place, count in enumerate(counts):
            self.counts[place] += count
