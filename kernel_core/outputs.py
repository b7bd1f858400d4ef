"""From `Updates`, which are columns of tokens, to `RequestOutput`: text, stop strings, logprobs, n completions in one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from kernel_core.intake import Accepted
from kernel_core.plan import Logprobs
from kernel_core.protocols import TextCodec, TextStream
from kernel_core.request import (
    ERROR,
    FINISH_REASONS,
    RUNNING,
    STOP,
    CompletionOutput,
    DraftCounts,
    Logprob,
    RequestOutput,
    RequestTimings,
    SamplingParams,
    Updates,
)

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Completion:
    """One sequence in the core, and what its user sees of it."""

    request_id: str
    output: CompletionOutput
    parent: Tracked
    stream: TextStream | None

    def extend(self, tokens: list[int], code: int, stop_token: int) -> bool:
        """New tokens and a finish code arrive. True: a stop string ended it, tokens after it do not count."""
        params, output = self.parent.params, self.output
        text, stop = "", None
        if self.stream is not None:
            hidden = code == STOP and tokens[-1:] == [stop_token] and not params.include_stop_str_in_output
            text, stop, count = self.stream.push(tokens[:-1] if hidden else tokens)
            if stop is not None:
                tokens = tokens[:count]
            elif code != RUNNING:
                text += self.stream.flush()
        output.text += text
        output.token_ids += tokens
        if stop is not None:
            output.finish_reason, output.stop_reason = "stop", stop
        elif code != RUNNING:
            output.finish_reason = FINISH_REASONS[code]
            output.stop_reason = stop_token if code == STOP and stop_token in (params.stop_token_ids or ()) else None
        return stop is not None

    def add_logprobs(self, position: int, entry: dict[int, Logprob], chosen: float) -> None:
        """Of the token at `position` of the sequence, unless it was dropped or has them already."""
        index, output = position - len(self.parent.output.prompt_token_ids), self.output
        if output.logprobs is None or index != len(output.logprobs) or index >= len(output.token_ids):
            return
        output.logprobs.append(entry)
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + chosen


@dataclass(slots=True, eq=False)
class Tracked:
    """One user request. `output` is the live object: it grows until it is finished, `snapshot` does not."""

    output: RequestOutput
    params: SamplingParams
    running: int
    completions: list[Completion] = field(default_factory=list)

    def snapshot(self) -> RequestOutput:
        """As it is now; the live object itself once it is finished."""
        if self.output.finished:
            return self.output
        outputs = [replace(c, token_ids=c.token_ids.copy(), logprobs=_copied(c.logprobs)) for c in self.output.outputs]
        timings, prompt = replace(self.output.timings), _copied(self.output.prompt_logprobs)
        return replace(self.output, outputs=outputs, prompt_logprobs=prompt, timings=timings)

    def add_prompt_logprobs(self, position: int, entry: dict[int, Logprob]) -> None:
        """A prompt that is computed again after preemption reports them again; only what is next is taken."""
        known = self.output.prompt_logprobs
        if known is not None and position == len(known):
            known.append(entry)


def _copied(entries: list[T] | None) -> list[T] | None:
    return None if entries is None else entries.copy()


class Outputs:
    """All requests of one face that are not finished. Used by one thread."""

    def __init__(self, codec: TextCodec | None) -> None:
        self._codec = codec
        self._tracked: dict[str, Tracked] = {}
        self._completions: dict[str, Completion] = {}
        self.drafts = DraftCounts()

    def __len__(self) -> int:
        return len(self._tracked)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._tracked

    def add(self, accepted: Accepted) -> RequestOutput:
        """→ its live output, which grows with every `apply`."""
        params = accepted.params
        output = RequestOutput(accepted.request_id, accepted.prompt, accepted.token_ids, [])
        output.timings = RequestTimings(arrival=accepted.arrival)
        output.prompt_logprobs = None if params.prompt_logprobs is None else [None]
        tracked = Tracked(output, params, len(accepted.requests))
        for index, request in enumerate(accepted.requests):
            completion = CompletionOutput(index, logprobs=None if params.logprobs is None else [])
            stream = self._codec.stream(accepted.token_ids, params) if self._codec and params.detokenize else None
            tracked.completions.append(Completion(request.id, completion, tracked, stream))
            self._completions[request.id] = tracked.completions[-1]
            output.outputs.append(completion)
        self._tracked[output.request_id] = tracked
        return output

    def forget(self, request_id: str) -> None:
        """The engine refused it: nothing will come."""
        for completion in self._tracked.pop(request_id).completions:
            self._completions.pop(completion.request_id, None)

    def core_ids(self, request_ids: Sequence[str]) -> list[str]:
        """The running sequences of these user requests; unknown ones are ignored."""
        found = [self._tracked[name] for name in request_ids if name in self._tracked]
        return [c.request_id for tracked in found for c in tracked.completions if c.request_id in self._completions]

    def apply(self, updates: Updates) -> tuple[list[Tracked], list[str]]:
        """→ the requests that changed, in the order of the updates, and the core requests to abort because a stop string
        ended them. Rate: once per step."""
        now = time.monotonic()
        rows = [self._completions.get(name) for name in updates.requests]
        tokens, offsets = updates.tokens.tolist(), updates.offsets.tolist()
        finish, stops = updates.finish.tolist(), updates.stop_token.tolist()
        changed: dict[Tracked, None] = {}
        aborts = []
        self._scheduled(updates, now)
        for name, kind, array in updates.outputs:
            if name in self._completions:
                self._completions[name].output.outputs[kind] = array
        for i, completion in enumerate(rows):
            if completion is None:
                continue
            new = tokens[offsets[i] : offsets[i + 1]]
            if new and completion.parent.output.timings.first_token is None:
                completion.parent.output.timings.first_token = now - completion.parent.output.timings.arrival
            stopped = completion.extend(new, finish[i], stops[i])
            if stopped and finish[i] == RUNNING:
                aborts.append(completion.request_id)
            if stopped or finish[i] != RUNNING:
                error = updates.errors.get(completion.request_id) if finish[i] == ERROR and not stopped else None
                self._finish(completion, now, error)
            changed[completion.parent] = None
        self._logprobs(updates, rows)
        self._count_drafts(updates, rows)
        return list(changed), aborts

    def _count_drafts(self, updates: Updates, rows: Sequence[Completion | None]) -> None:
        if updates.drafted is None or updates.accepted is None:
            return
        self.drafts.add(updates.drafted, updates.accepted)
        for completion, drafted, accepted in zip(rows, updates.drafted.tolist(), updates.accepted.tolist()):
            if completion is not None:
                completion.output.num_drafted += drafted
                completion.output.num_accepted += accepted

    def fail(self, reason: str) -> list[Tracked]:
        """Every request ends with this error."""
        now, tracked = time.monotonic(), list(self._tracked.values())
        for completion in list(self._completions.values()):
            completion.extend([], ERROR, -1)
            self._finish(completion, now, reason)
        return tracked

    def _scheduled(self, updates: Updates, now: float) -> None:
        for name, cached in updates.cached.items():
            completion = self._completions.get(name)
            if completion is not None and completion.output.index == 0:
                output = completion.parent.output
                scheduled = now if updates.planned_at is None else updates.planned_at
                output.num_cached_tokens, output.timings.queued = cached, scheduled - output.timings.arrival

    def _finish(self, completion: Completion, now: float, error: str | None) -> None:
        del self._completions[completion.request_id]
        tracked = completion.parent
        tracked.running -= 1
        tracked.output.error = tracked.output.error or error
        if tracked.running == 0:
            tracked.output.finished = True
            tracked.output.timings.finished = now - tracked.output.timings.arrival
            del self._tracked[tracked.output.request_id]

    def _logprobs(self, updates: Updates, rows: Sequence[Completion | None]) -> None:
        for row, position, entry, chosen in self._entries(updates.logprobs):
            completion = rows[row]
            if completion is not None:
                completion.add_logprobs(position, entry, chosen)
        for row, position, entry, _ in self._entries(updates.prompt_logprobs):
            completion = rows[row]
            if completion is not None:
                completion.parent.add_prompt_logprobs(position, entry)

    def _entries(self, columns: Logprobs | None) -> Iterator[tuple[int, int, dict[int, Logprob], float]]:
        """(row, position, {token: Logprob}, value of the chosen token). The chosen token comes first, with its own rank."""
        if columns is None:
            return
        name = self._codec.token if self._codec else lambda token: None
        lists = (columns.row, columns.position, columns.token_ids, columns.values, columns.rank)
        for row, position, ids, values, rank in zip(*(column.tolist() for column in lists)):
            entry = {ids[0]: Logprob(values[0], rank, name(ids[0]))}
            for place, (token, value) in enumerate(zip(ids[1:], values[1:]), 1):
                if token >= 0:
                    entry.setdefault(token, Logprob(value, place, name(token)))
            yield row, position, entry, values[0]
