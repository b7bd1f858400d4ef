"""The longest suffix that occurred before, of any length, by one suffix automaton per request, on the host.

Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985): a token costs O(1) amortised.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from kernel_core.nn.api import DraftView, upload

ROOT = 0


class SuffixAutomaton:
    """All substrings of `tokens`, which grow by `extend`.

    States are columns: `length` of the longest string, `link` to the state of its longest suffix that ends in more places,
    `follow` the transitions,
    `end` a place where the strings ended before: the last time that they were the longest repeated suffix, else the first."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.length, self.link, self.end = [0], [-1], [-1]
        self.follow: list[dict[int, int]] = [{}]
        self.last = ROOT

    def extend(self, token: int) -> None:
        """Append a token. Amortised O(1)."""
        self.end[self.repeated] = len(self.tokens) - 1
        new = self._state(self.length[self.last] + 1, {}, len(self.tokens))
        self.tokens.append(token)
        state = self.last
        while state >= 0 and token not in self.follow[state]:
            self.follow[state][token] = new
            state = self.link[state]
        self.link[new] = ROOT if state < 0 else self._exactly(state, token)
        self.last = new

    def _exactly(self, state: int, token: int) -> int:
        """The state of the longest string of `state` followed by `token`; split off where longer strings share its state."""
        target = self.follow[state][token]
        if self.length[target] == self.length[state] + 1:
            return target
        split = self._state(self.length[state] + 1, dict(self.follow[target]), self.end[target])
        self.link[split], self.link[target] = self.link[target], split
        while state >= 0 and self.follow[state].get(token) == target:
            self.follow[state][token] = split
            state = self.link[state]
        return split

    def _state(self, length: int, follow: dict[int, int], end: int) -> int:
        self.length.append(length)
        self.link.append(-1)
        self.follow.append(follow)
        self.end.append(end)
        return len(self.length) - 1

    @property
    def repeated(self) -> int:
        """The state of the longest suffix that occurred before; ROOT: none did."""
        return max(self.link[self.last], ROOT)

    def continuation(self, least: int, number: int) -> list[int]:
        """What followed the longest repeated suffix, if it has at least `least` tokens; beyond the last token it repeats."""
        state = self.repeated
        if state == ROOT or self.length[state] < least:
            return []
        end = self.end[state]
        period = len(self.tokens) - 1 - end
        return [self.tokens[end + 1 + place % period] for place in range(number)]


class Suffixes:
    """One automaton a slot, made when drafts are first looked for and caught up with whenever they are again."""

    needs_host = True

    def __init__(self, least: int) -> None:
        self.least = least
        self.automata: dict[int, SuffixAutomaton] = {}

    def closed(self, slot: int) -> None:
        self.automata.pop(slot, None)

    def find(self, view: DraftView, rows: np.ndarray, number: int) -> Tensor:
        known = view.known.tolist()
        drafts = np.full((len(rows), number), -1, np.int64)
        for index, row in enumerate(rows.tolist()):
            automaton = self._caught_up(view, int(view.host_slots[row]), known[row])
            found = automaton.continuation(self.least, number)
            drafts[index, : len(found)] = found
        return upload(drafts, view.known.device)

    def _caught_up(self, view: DraftView, slot: int, known: int) -> SuffixAutomaton:
        automaton = self.automata.setdefault(slot, SuffixAutomaton())
        new = view.step.history[slot, len(automaton.tokens) : known]
        for token in new.tolist():
            automaton.extend(token)
        return automaton
