"""`Updates` in columns: what the rows of a committed step gained, and what ended besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kernel_core.plan import NO_TOKEN, Logprobs, StepResult
from kernel_core.request import Updates


@dataclass(slots=True)
class Outcome:
    """The rows of a step while it is committed. Row i keeps kept[i] of its tokens, the first at position before[i];
    `finish` and `stop_token` hold zeros and -1 until something ends."""

    ids: Sequence[str]  # by row
    before: np.ndarray
    kept: np.ndarray
    finish: np.ndarray
    stop_token: np.ndarray
    reported: np.ndarray | None = None  # prompt positions up to it are not reported (again)
    whole: bool = True  # every row keeps what it gained

    @classmethod
    def of(cls, ids: Sequence[str], before: np.ndarray, gained: np.ndarray) -> Outcome:
        return cls(ids, before, gained, np.zeros(gained.size, np.int32), np.zeros(gained.size, np.int32) - 1)

    def keep(self, row: int, count: int) -> None:
        if self.whole:
            self.kept, self.whole = self.kept.copy(), False
        self.kept[row] = count

    def end(self, row: int, code: int, stop_token: int = NO_TOKEN) -> None:
        self.finish[row], self.stop_token[row] = code, stop_token


@dataclass(slots=True)
class Events:
    """Requests that ended outside of a row (abort, failed gate, no room) and were not reported yet."""

    ids: list[str] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    errors: dict[str, str] = field(default_factory=dict)

    def add(self, request_id: str, code: int, error: str | None = None) -> None:
        self.ids.append(request_id)
        self.codes.append(code)
        if error is not None:
            self.errors[request_id] = error

    def updates(self) -> Updates:
        count = len(self.ids)
        tokens, offsets, finish, stop_token = (np.zeros(n, np.int32) for n in (0, 1, 0, 0))
        nothing = Updates((), tokens, offsets, finish, stop_token)
        return self.append_to(nothing) if count else nothing

    def append_to(self, updates: Updates) -> Updates:
        """The same with the ended requests after the others."""
        more = len(self.ids)
        return replace(
            updates,
            requests=(*updates.requests, *self.ids),
            offsets=np.concatenate([updates.offsets, np.full(more, updates.offsets[-1], np.int32)]),
            finish=np.concatenate([updates.finish, np.array(self.codes, np.int32)]),
            stop_token=np.concatenate([updates.stop_token, np.full(more, NO_TOKEN, np.int32)]),
            errors={**updates.errors, **self.errors},
            drafted=_padded(updates.drafted, more),
            accepted=_padded(updates.accepted, more),
        )


def _padded(column: np.ndarray | None, more: int) -> np.ndarray | None:
    return None if column is None else np.concatenate([column, np.zeros(more, np.int32)])


def kept_tokens(outcome: Outcome, result: StepResult) -> np.ndarray:
    """The tokens that count, flat."""
    if outcome.whole:
        return result.tokens
    gained = np.diff(result.offsets)
    return result.tokens[np.arange(gained.sum()) - np.repeat(result.offsets[:-1], gained) < np.repeat(outcome.kept, gained)]


def build(outcome: Outcome, result: StepResult, cached: Mapping[str, int]) -> Updates:
    """Columns of the rows that gained, ended or have prompt logprobs; the result's own arrays where all rows did."""
    kept, tokens = outcome.kept, kept_tokens(outcome, result)
    sampled, prompt = result.logprobs, result.prompt_logprobs
    if sampled is not None:
        sampled = _filter(sampled, sampled.position < (outcome.before + kept)[sampled.row])
    if prompt is not None and outcome.reported is not None:
        prompt = _filter(prompt, prompt.position > outcome.reported[prompt.row])
    updates = Updates(tuple(outcome.ids), tokens, result.offsets, outcome.finish, outcome.stop_token, cached, sampled, prompt)
    if result.drafted.any():
        updates = replace(updates, drafted=result.drafted, accepted=result.accepted)
    if outcome.whole and kept.all():
        return updates
    shown = (kept > 0) | (outcome.finish > 0)
    if prompt is not None:
        shown[prompt.row] = True
    rows = np.flatnonzero(shown)
    return replace(
        updates,
        requests=tuple(outcome.ids[i] for i in rows.tolist()),
        offsets=np.concatenate([[0], kept[rows].cumsum()]).astype(np.int32),
        finish=outcome.finish[rows],
        stop_token=outcome.stop_token[rows],
        logprobs=_renumber(sampled, rows, kept.size),
        prompt_logprobs=_renumber(prompt, rows, kept.size),
        drafted=None if updates.drafted is None else updates.drafted[rows],
        accepted=None if updates.accepted is None else updates.accepted[rows],
    )


def _filter(logprobs: Logprobs, keep: np.ndarray) -> Logprobs:
    if keep.all():
        return logprobs
    fields = (logprobs.row, logprobs.position, logprobs.token_ids, logprobs.values, logprobs.rank)
    return Logprobs(*(column[keep] for column in fields))


def _renumber(logprobs: Logprobs | None, rows: np.ndarray, count: int) -> Logprobs | None:
    """Rows of the plan become indices into `rows`, which hold all that occur."""
    if logprobs is None:
        return None
    index = np.full(count, -1, np.int32)
    index[rows] = np.arange(rows.size)
    return replace(logprobs, row=index[logprobs.row])
