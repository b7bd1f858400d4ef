"""The engine part: an observer that counts what steps bring, in arrays over slots."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kernel_core.api import Arrival, EngineContext, Opened, StepRecord, decode, encode
from kernel_metrics.histogram import Histogram
from kernel_metrics.records import HttpCounts, Sample
from kernel_metrics.series import HTTP_SECONDS, SERIES


@dataclass(slots=True)
class Tracked:
    """A sequence from its arrival to its end. Seconds on the monotonic clock, 0: not yet. While it owns a slot, `first`, `last`
    and `generated` are in the recorder's arrays."""

    arrival: Arrival
    slot: int = -1
    scheduled: float = 0.0
    cached: int = 0
    first: float = 0.0
    last: float = 0.0
    generated: int = 0


@dataclass(slots=True)
class Family:
    """A user request with several choices."""

    size: int = 0
    unfinished: int = 0
    longest: int = 0


class Recorder:
    """Implements `Observer`. The cost of a step does not follow the number of running sequences, but for the arrays."""

    def __init__(self, context: EngineContext) -> None:
        self._blocks = [count - 1 for count in context.num_blocks]
        self._free: Sequence[int] = self._blocks
        self._counts: Counter[str] = Counter()
        self._endings: Counter[str] = Counter()
        self._places: list[int] = []  # accepted drafts by position
        self._histograms = {name: Histogram(s.buckets) for name, s in SERIES.items() if s.kind == "histogram"}
        self._http: Counter[tuple[str, str, int]] = Counter()
        self._http_seconds: dict[str, Histogram] = {}
        self._tracked: dict[str, Tracked] = {}
        self._families: dict[str, Family] = {}
        self._owners: list[Tracked | None] = [None] * context.max_slots
        self._live = np.zeros(context.max_slots, bool)
        self._first, self._last = np.zeros((2, context.max_slots))
        self._generated = np.zeros(context.max_slots, np.int64)

    # ---- what the loop tells

    def added(self, arrival: Arrival) -> None:
        self._tracked[arrival.id] = Tracked(arrival)
        if arrival.family is not None:
            family = self._families.setdefault(arrival.family, Family())
            family.size += 1
            family.unfinished += 1

    def step(self, record: StepRecord) -> None:
        plan, result = record.plan, record.result
        for slot in plan.closed:
            self._leave(int(slot))
        for opened in plan.opened:
            self._enter(opened, record.planned_at)
        self._free, self._counts["num_preemptions"] = record.free_blocks, record.preemptions
        if not len(plan.rows):
            return
        self._counts["engine_steps"] += 1
        self._histograms["iteration_tokens_total"].observe(float(plan.q.sum()))
        self._histograms["step_time_seconds"].observe(record.committed_at - record.planned_at)
        gained = np.diff(result.offsets)
        counted = self._live[plan.rows] & (gained > 0)  # rows of sequences that ended since are void
        self._tokens(plan.rows[counted], gained[counted], record.committed_at)
        if result.drafted.any():
            self._drafts(result.drafted[counted], result.accepted[counted])

    def finished(self, request_id: str, reason: str, num_prompt: int, num_output: int) -> None:
        tracked = self._tracked.pop(request_id)
        if tracked.slot >= 0:
            self._live[tracked.slot] = False
            self._leave(tracked.slot)
        self._counts["generation_tokens"] += num_output - tracked.generated  # tokens after a stop are no output
        self._endings[reason] += 1
        self._close(tracked, num_output)

    # ---- one step

    def _enter(self, opened: Opened, now: float) -> None:
        tracked = self._tracked.get(opened.request_id)
        if tracked is None:
            return  # it ended while the plan was in flight
        slot = tracked.slot = opened.slot
        if not tracked.scheduled:
            tracked.scheduled, tracked.cached = now, opened.computed
            self._counts["prefix_cache_queries"] += tracked.arrival.num_prompt
            self._counts["prefix_cache_hits"] += opened.computed
        self._owners[slot], self._live[slot] = tracked, True
        self._first[slot], self._last[slot], self._generated[slot] = tracked.first, tracked.last, tracked.generated

    def _leave(self, slot: int) -> None:
        tracked, self._owners[slot] = self._owners[slot], None
        if tracked is None:
            return
        self._live[slot], tracked.slot = False, -1
        tracked.first, tracked.last = float(self._first[slot]), float(self._last[slot])
        tracked.generated = int(self._generated[slot])

    def _tokens(self, slots: np.ndarray, gained: np.ndarray, now: float) -> None:
        self._counts["generation_tokens"] += int(gained.sum())
        self._generated[slots] += gained
        last = self._last[slots]
        started = last > 0
        for slot in slots[~started]:
            self._begin(int(slot), now)
        since = (now - last[started]) / gained[started]  # the tokens of one step share its time
        self._histograms["inter_token_latency_seconds"].observe_each(since, gained[started])
        self._last[slots] = now

    def _begin(self, slot: int, now: float) -> None:
        """The first token."""
        tracked = self._owners[slot]
        if tracked is None:
            return
        self._first[slot] = now
        self._histograms["time_to_first_token_seconds"].observe(now - tracked.arrival.at)
        self._counts["prompt_tokens"] += tracked.arrival.num_prompt
        self._counts["cached_tokens"] += tracked.cached

    def _drafts(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        self._counts["spec_decode_num_drafts"] += int(np.count_nonzero(drafted))
        self._counts["spec_decode_num_draft_tokens"] += int(drafted.sum())
        self._counts["spec_decode_num_accepted_tokens"] += int(accepted.sum())
        self._places += [0] * (int(drafted.max(initial=0)) - len(self._places))
        for place in range(int(accepted.max(initial=0))):
            self._places[place] += int(np.count_nonzero(accepted > place))

    # ---- the end of a sequence

    def _close(self, tracked: Tracked, generated: int) -> None:
        arrival, histograms = tracked.arrival, self._histograms
        histograms["request_prompt_tokens"].observe(arrival.num_prompt)
        histograms["request_generation_tokens"].observe(generated)
        histograms["request_params_max_tokens"].observe(arrival.max_tokens)
        if tracked.scheduled:
            histograms["request_queue_time_seconds"].observe(tracked.scheduled - arrival.at)
        if tracked.first:
            histograms["e2e_request_latency_seconds"].observe(tracked.last - arrival.at)
            histograms["request_inference_time_seconds"].observe(tracked.last - tracked.scheduled)
            histograms["request_prefill_time_seconds"].observe(tracked.first - tracked.scheduled)
            histograms["request_decode_time_seconds"].observe(tracked.last - tracked.first)
        if tracked.first and generated > 1:
            each = (tracked.last - tracked.first) / (generated - 1)
            histograms["request_time_per_output_token_seconds"].observe(each)
        self._close_family(arrival.family, generated)

    def _close_family(self, name: str | None, generated: int) -> None:
        family = Family(1, 1) if name is None else self._families[name]
        family.unfinished -= 1
        family.longest = max(family.longest, generated)
        if family.unfinished == 0:
            self._families.pop(name or "", None)
            self._histograms["request_params_n"].observe(family.size)
            self._histograms["request_max_num_generation_tokens"].observe(family.longest)

    # ---- what the API processes tell

    def add(self, data: bytes) -> bytes:
        """`HttpCounts` of one process; what all told adds up."""
        counts = decode(data, HttpCounts)
        for method, route, status, times in counts.requests:
            self._http[method, route, status] += times
        for route, total, places in counts.seconds:
            self._http_seconds.setdefault(route, Histogram(HTTP_SECONDS)).add(total, places)
        return b""

    # ---- what readers get

    def read(self) -> bytes:
        """→ list[Sample], in the order of `SERIES`."""
        order = list(SERIES)
        return encode(sorted(self._samples(), key=lambda sample: order.index(sample.name)))

    def _samples(self) -> Iterator[Sample]:
        for name, series in SERIES.items():
            if series.kind == "counter" and name not in LABELLED:
                yield Sample(name, value=self._counts[name])
        for name, histogram in self._histograms.items():
            if name not in LABELLED:
                yield Sample(name, {}, histogram.sum, histogram.counts)
        yield from self._gauges()
        yield from self._labelled()

    def _gauges(self) -> Iterator[Sample]:
        running = int(np.count_nonzero(self._live))
        free = self._free if self._tracked else self._blocks  # without requests all blocks may be taken
        yield Sample("num_requests_running", value=running)
        yield Sample("num_requests_waiting", value=len(self._tracked) - running)
        shares = [1 - left / max(total, 1) for left, total in zip(free, self._blocks, strict=True)]
        yield Sample("kv_cache_usage_perc", value=max(shares, default=0.0))
        for group, (left, total) in enumerate(zip(free, self._blocks, strict=True)):
            yield Sample("kv_blocks", {"group": str(group)}, total)
            yield Sample("kv_blocks_free", {"group": str(group)}, left)

    def _labelled(self) -> Iterator[Sample]:
        cached = self._counts["cached_tokens"]
        yield Sample("prompt_tokens_by_source", {"source": "local_compute"}, self._counts["prompt_tokens"] - cached)
        yield Sample("prompt_tokens_by_source", {"source": "local_cache_hit"}, cached)
        for reason in sorted({"stop", "length", "abort", "error"} | set(self._endings)):
            yield Sample("request_success", {"finished_reason": reason}, self._endings[reason])
        for place, count in enumerate(self._places):
            yield Sample("spec_decode_num_accepted_tokens_per_pos", {"position": str(place)}, count)
        for (method, route, status), times in self._http.items():
            yield Sample("http_requests", {"method": method, "route": route, "status": str(status)}, times)
        for route, histogram in self._http_seconds.items():
            yield Sample("http_request_seconds", {"route": route}, histogram.sum, histogram.counts)


LABELLED = {
    "prompt_tokens_by_source",
    "request_success",
    "spec_decode_num_accepted_tokens_per_pos",
    "http_requests",
    "http_request_seconds",
}
