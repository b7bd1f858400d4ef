"""Whose sequences are whose: the updates of a step, divided among the API processes that own them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from kernel_core.api import Logprobs, Updates
from kernel_openai_server.engine.joining import Steady

NOBODY = -1
News = Updates | Steady


class Owners:
    """The API process (its zmq identity) of every sequence that runs."""

    def __init__(self) -> None:
        self._owner: dict[str, bytes] = {}
        self._owned: dict[bytes, set[str]] = {}

    def add(self, identity: bytes, ids: Iterable[str]) -> None:
        for name in ids:
            self._owner[name] = identity
            self._owned.setdefault(identity, set()).add(name)

    def forget(self, identity: bytes) -> list[str]:
        """The API process is gone. → its sequences."""
        ids = self._owned.pop(identity, set())
        for name in ids:
            del self._owner[name]
        return sorted(ids)

    def keep_own(self, identity: bytes, ids: Iterable[str]) -> list[str]:
        """Those that belong to it."""
        return [name for name in ids if self._owner.get(name) == identity]

    def divide(self, updates: News) -> Iterator[tuple[bytes, News]]:
        """What to tell whom; sequences that ended are forgotten. Rate: once per step, or per message where steps are steady."""
        if not updates.requests:
            return
        if len(self._owned) == 1:  # nobody else reads: no need to look at every row
            identity = next(iter(self._owned))
            self._end(updates)
            yield identity, updates
            return
        places = {identity: i for i, identity in enumerate(self._owned)}
        of_row = np.array([places.get(self._owner.get(name, b""), NOBODY) for name in updates.requests], np.int32)
        self._end(updates)
        for identity, place in places.items():
            rows = np.flatnonzero(of_row == place)
            if rows.size:
                yield identity, updates.take(rows) if isinstance(updates, Steady) else take_rows(updates, rows)

    def _end(self, updates: News) -> None:
        if isinstance(updates, Steady):
            return
        for row in np.flatnonzero(updates.finish).tolist():
            name = updates.requests[row]
            identity = self._owner.pop(name, None)
            if identity is not None:
                owned = self._owned[identity]
                owned.discard(name)
                if not owned:
                    del self._owned[identity]


def take_rows(updates: Updates, rows: np.ndarray) -> Updates:
    """The same for some rows only (ascending indexes [r])."""
    if rows.size == len(updates.requests):
        return updates
    counts = np.diff(updates.offsets)
    kept = np.zeros(len(updates.requests), bool)
    kept[rows] = True
    names = tuple(updates.requests[row] for row in rows.tolist())
    offsets = np.zeros(rows.size + 1, np.int32)
    np.cumsum(counts[rows], out=offsets[1:])
    own = set(names)
    return replace(
        updates,
        requests=names,
        tokens=updates.tokens[np.repeat(kept, counts)],
        offsets=offsets,
        finish=updates.finish[rows],
        stop_token=updates.stop_token[rows],
        cached={name: hit for name, hit in updates.cached.items() if name in own},
        logprobs=_take_logprobs(updates.logprobs, kept),
        prompt_logprobs=_take_logprobs(updates.prompt_logprobs, kept),
        outputs=tuple(output for output in updates.outputs if output[0] in own),
        errors={name: error for name, error in updates.errors.items() if name in own},
        drafted=None if updates.drafted is None else updates.drafted[rows],
        accepted=None if updates.accepted is None else updates.accepted[rows],
    )


def _take_logprobs(logprobs: Logprobs | None, kept: np.ndarray) -> Logprobs | None:
    if logprobs is None:
        return None
    entries = kept[logprobs.row]
    row = (np.cumsum(kept) - 1)[logprobs.row[entries]].astype(np.int32)
    columns = (logprobs.position, logprobs.token_ids, logprobs.values, logprobs.rank)
    return replace(
        logprobs, row=row, **dict(zip(("position", "token_ids", "values", "rank"), (column[entries] for column in columns)))
    )
