"""The scheduler: which tokens of which requests a step computes, where their KV goes, and what its result changes.

One invariant instead of phases: every request has known and computed tokens, and each step lets the second chase the first
within a token budget. Counts of running requests are upper bounds while plans are in flight (`slots.py`), KV is allocated
for the bound (`blocks.py`), and everything that frees, stops or reports uses committed counts. A plan is a deterministic
function of the events before it (add, abort, open_gate, results).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kernel_core import columns
from kernel_core.blocks import BlockHandle, KVBlocks
from kernel_core.config import EngineConfig
from kernel_core.errors import CapacityError, EngineDeadError, RequestError
from kernel_core.families import GATE, Families
from kernel_core.plan import Ack, Allocation, Capabilities, Job, KVGroup, Opened, StepPlan, StepResult
from kernel_core.policy import FirstComeFirstServed
from kernel_core.prefixes import Prefixes
from kernel_core.protocols import Connector, Policy, PrefixIndex, RequestView, Resource
from kernel_core.request import ABORT, ERROR, LENGTH, RUNNING, STOP, Request, Updates
from kernel_core.selection import Selection, Selector
from kernel_core.slots import Slots
from kernel_core.stops import StopTable
from kernel_core.waiting import Entry, State, WaitingQueue

logger = logging.getLogger("kernel_core")
GROW_EVERY = 10_000  # plans after which steps that were too large for the device's memory may be twice as large again
TOO_LARGE = (
    "the device has no memory for even one token of this request beside its weights and KV; "
    "lower engine.memory_fraction or engine.kv_memory, which leaves more for the steps"
)
RETRY_EVERY = 16  # plans after which requests that a resource refused are tried again without a release


@dataclass(slots=True)
class Flight:
    """A plan that is not committed yet. `drained`: requests preempted since, by slot, that keep what it brings them."""

    plan: StepPlan
    rows: np.ndarray  # intp
    ids: tuple[str, ...]
    closures: int
    cached: dict[str, int]
    drained: dict[int, Entry] = field(default_factory=dict)


class Scheduler:
    """Owns every request from `add` to its finish code, which appears in exactly one `Updates`.

    Called by the loop (`plan`, `commit`, one thread) and by the engine between steps (the others). `depth` is how many plans
    may be in flight; they are committed in order. Raises CapacityError when the pools cannot hold one maximal request.

    policy_plugin: the plugin whose payload policy views carry."""

    def __init__(
        self,
        config: EngineConfig,
        groups: tuple[KVGroup, ...],
        allocation: Allocation,
        capabilities: Capabilities,
        policy: Policy | None = None,
        resources: Sequence[Resource] = (),
        depth: int = 1,
        policy_plugin: str | None = None,
        prefix_index: PrefixIndex | None = None,
        connector: Connector | None = None,
    ) -> None:
        self.allocation, self.depth = allocation, depth
        self.policy = policy or FirstComeFirstServed()
        self.resources = {resource.name: resource for resource in resources}
        self.slots = Slots(allocation.max_slots, allocation.max_model_len)
        self.kv = KVBlocks(groups, allocation, prefix_index)
        self.families = Families(self.kv)
        reads_hits = prefix_index is not None and getattr(self.policy, "reads_hits", False)
        self.queue = WaitingQueue(self.policy, config.policy_passes, self._view_with_hit if reads_hits else self.view)
        self.prefixes = Prefixes(prefix_index, self.kv, self.slots, allocation.lookback, self.queue.push, connector)
        parts = (self.slots, self.kv, self.queue, self.families, self.prefixes)
        self.selector = Selector(config, allocation, capabilities, self.policy, self.resources, parts, self, depth)
        self.preemptions = 0
        self.finished: list[tuple[str, int, int, int]] = []  # (id, code, prompt, output tokens); the loop empties it
        self._policy_plugin = policy_plugin
        self._entries: dict[str, Entry] = {}
        self._flights: deque[Flight] = deque()
        self._events = columns.Events()
        self._stops = StopTable()
        self._closing: list[int] = []  # slots that the next plan closes
        self._jobs: list[Job] = []  # for the next plan
        self._unacked: set[tuple[str, str]] = set()
        self._cached: dict[str, int] = {}  # hit tokens of requests first scheduled in the plan being made
        self._committed = self._arrivals = 0
        self._released = False  # a resource was released since the last plan
        self._limited_at = 0  # the last plan made before the size of steps was changed
        if not self.kv.fits(allocation.max_model_len - 1, 1 + allocation.draft_width):
            raise CapacityError(
                f"one request of max_model_len {allocation.max_model_len} does not fit into {allocation.num_blocks} KV blocks; "
                "lower max_model_len or raise kv_memory"
            )

    # ---- counts ---------------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests that own a slot."""
        return self.slots.rows.size

    @property
    def waiting(self) -> int:
        """Requests that own none: queued, gated or preempted."""
        return len(self._entries) - self.running

    @property
    def unfinished(self) -> int:
        return len(self._entries)

    @property
    def free_blocks(self) -> tuple[int, ...]:
        """Per KV group."""
        return self.kv.free()

    def has_work(self) -> bool:
        """Is there something to plan, to commit or to report? Requests behind closed gates alone are no work, unless a
        job that they wait for is on its way."""
        return bool(self._flights or self._events.ids or self.plannable())

    def plannable(self) -> bool:
        """Would a plan have something to do?"""
        return bool(self.slots.rows.size or len(self.queue) or self._jobs or self._unacked)

    # ---- requests -------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take a request over. Raises RequestError when it can never run; nothing is kept of it then."""
        self._validate(request)
        self._arrivals += 1
        request.arrival = self._arrivals
        entry = Entry(request, self._arrivals, np.asarray(request.token_ids, np.int32), set(request.gates))
        self._entries[request.id] = entry
        self._jobs.extend(request.jobs)
        self._stops.add(request.stop_ids)
        self.families.join(entry)
        self.prefixes.arrived(entry)
        if not entry.closed_gates:
            self.queue.push(entry)

    def _validate(self, request: Request) -> None:
        prompt, limit = len(request.token_ids), self.allocation.max_model_len
        unknown = [name for name in request.resources if name not in self.resources]
        checks = (
            (request.id not in self._entries, "a request with this id is running already"),
            (prompt > 0, "the prompt is empty"),
            (prompt < request.max_len, f"the prompt has {prompt} tokens and leaves no room for output below {request.max_len}"),
            (request.max_len <= limit, f"prompt and output may have {request.max_len} tokens, max_model_len is {limit}"),
            (not request.spans, "input spans are not supported by this engine"),
            (not unknown, f"no enabled plugin offers the resources {unknown}"),
            (self.kv.fits(request.max_len - 1, 1), "the request needs more KV blocks than there are; raise kv_memory"),
        )
        for passed, message in checks:
            if not passed:
                raise RequestError(f"request {request.id!r}: {message}")

    def abort(self, ids: Iterable[str]) -> None:
        """End requests, whatever they are doing; unknown ids (they may just have ended) are ignored."""
        for request_id in ids:
            entry = self._entries.get(request_id)
            if entry is not None:
                self._end(entry, ABORT)
                self._events.add(request_id, ABORT)

    def fail(self, entry: Entry, reason: str) -> None:
        """End one request with an error."""
        self._end(entry, ERROR)
        self._events.add(entry.request.id, ERROR, reason)

    def fail_all(self, reason: str) -> Updates:
        """The workers are gone: every request ends with this error, plans in flight are forgotten."""
        self._flights.clear()
        for entry in list(self._entries.values()):
            self.fail(entry, reason)
        self.slots.free(self._closing)
        self.kv.reclaim(self.slots.last_plan)
        self._closing, self._jobs, self._unacked = [], [], set()
        return self.updates()

    def open_gate(self, request_id: str, gate: str, error: str | None = None) -> None:
        """One of the request's gates opens; with `error` the request fails. Requests that ended are ignored."""
        entry = self._entries.get(request_id)
        if entry is None:
            return
        entry.closed_gates.discard(gate)
        if error is not None:
            self.fail(entry, error)
        elif entry.state is State.GATED and not entry.closed_gates:
            self.queue.push(entry)

    def _acked(self, ack: Ack) -> None:
        """The ack of job (plugin, key) opens the gate "plugin:key" of every request that waits for it."""
        self._unacked.discard((ack.plugin, ack.key))
        if self.prefixes.fetches is not None and self.prefixes.fetches.acked(ack, self.slots.last_plan):
            return
        gate = f"{ack.plugin}:{ack.key}"
        for entry in list(self._entries.values()):
            if gate in entry.closed_gates:
                self.open_gate(entry.request.id, gate, ack.error)

    def updates(self) -> Updates:
        """What ended since the last commit; for an idle loop."""
        events, self._events = self._events, columns.Events()
        return events.updates()

    def view(self, entry: Entry) -> RequestView:
        """A snapshot for the policy."""
        request, slot, slots = entry.request, entry.slot, self.slots
        known, committed, planned = entry.tokens.size, 0, 0
        if slot >= 0:
            known, committed, planned = (int(a[slot]) for a in (slots.known_done, slots.computed_done, slots.computed))
        payload = request.payloads.get(self._policy_plugin) if self._policy_plugin else None
        counts = (entry.num_prompt, known, committed, planned, entry.cached or 0)
        return RequestView(request.id, entry.arrival, request.priority, *counts, payload, payloads=request.payloads)

    def _view_with_hit(self, entry: Entry) -> RequestView:
        return replace(self.view(entry), expected_hit=self.prefixes.expected(entry))

    def reset_cache(self) -> None:
        """Forget the KV that a prefix index keeps. Nothing may be in flight."""
        self.prefixes.reset()

    # ---- lives of requests ----------------------------------------------------------------------------------------

    def open(self, entry: Entry, handle: BlockHandle | None, computed: int) -> Opened:
        """A waiting request takes a slot in the plan being made; its first `computed` positions need no work."""
        request = entry.request
        entry.state = State.RUNNING
        slot = self.slots.open(entry, computed, 0 if handle is None else handle.tokens)
        if handle is not None:
            self.kv.adopt(slot, handle)
        self.prefixes.opened(entry, handle)
        if entry in self.families.leaders:
            self.families.computing[entry] = None
        if entry.cached is None:
            entry.cached = self._cached[request.id] = computed
        return Opened(slot, request.id, entry.tokens, computed, request.key, request.sampling, request.payloads)

    def _close(self, entry: Entry) -> None:
        """The request leaves its slot; blocks and slot are free when the last plan that names them is done."""
        slot = self.slots.close(entry)
        entry.prefix, entry.fetched = None, False
        self.prefixes.closed(slot)
        self.families.computing.pop(entry, None)
        self.kv.close(slot, self.slots.last_plan)
        self._closing.append(slot)
        for name in entry.request.resources:
            self.resources[name].release(entry.request.id)
            self._released = True

    def _end(self, entry: Entry, code: int) -> None:
        """Its finish code is reported by the caller."""
        request = entry.request
        known = entry.tokens.size if entry.slot < 0 else int(self.slots.known_done[entry.slot])
        if entry.state is State.RUNNING:
            self._close(entry)
        elif entry.state is State.WAITING:
            self.queue.remove(entry)
        entry.state = State.ENDED
        del self._entries[request.id]
        self._stops.remove(request.stop_ids)
        self.finished.append((request.id, code, entry.num_prompt, known - entry.num_prompt))
        if request.family is not None:
            for sibling in self.families.leave(entry, self.slots.last_plan):
                self.open_gate(sibling.request.id, GATE)

    def preempt(self, entry: Entry) -> None:
        """Take slot and blocks away; what it knows is recomputed later. It keeps the tokens of plans in flight, and is
        queued again when they are committed."""
        self.preemptions += 1
        slot, since = entry.slot, self.slots.since[entry.slot]
        self._take_back(entry)
        for flight in self._flights:
            if flight.plan.plan_id >= since and (flight.rows == slot).any():
                flight.drained[slot] = entry
                entry.inflight += 1
        if not entry.inflight:
            self.queue.push(entry)

    def _take_back(self, entry: Entry) -> None:
        slot = entry.slot
        entry.tokens = self.slots.tokens[slot, : self.slots.known_done[slot]].copy()
        entry.reported = int(self.slots.reported[slot])
        self._close(entry)
        self.kv.reclaim(self._committed)
        entry.state = State.DRAINING

    # ---- plan -----------------------------------------------------------------------------------------------------

    def plan(self) -> StepPlan:
        """The next step; may be empty. At most `depth` plans are in flight."""
        if len(self._flights) >= self.depth:
            raise EngineDeadError(f"{self.depth} plans are in flight already; commit the oldest first")
        self.kv.reclaim(self._committed)
        self._cached = {}
        for request_id in self.policy.refresh():
            if request_id in self._entries:
                self.queue.rekey(self._entries[request_id])
        if self._released or self.slots.last_plan % RETRY_EVERY == 0:
            self.queue.retry()
            self._released = False
        if self.selector.budget < self.selector.most and self.slots.last_plan - self._limited_at >= GROW_EVERY:
            self._limit(2 * self.selector.budget)
        return self._freeze(self.selector.select(any(flight.rows.size for flight in self._flights)))

    def _limit(self, tokens: int) -> None:
        self.selector.limit(tokens)
        self._limited_at = self.slots.last_plan

    def _freeze(self, sel: Selection) -> StepPlan:
        """Allocate, advance the bounds, and copy everything that the plan says."""
        slots, rows, q, room = self.slots, sel.rows, sel.q, sel.room
        if sel.more:
            more = np.array(sel.more, np.int32).T
            rows, q, room = (np.concatenate(pair) for pair in zip((rows, q, room), more))
        slots.last_plan += 1
        start = slots.computed.take(rows)
        ends = start + q
        # A copied block may lie beyond the first chunk of what is computed again.
        new_blocks = self.kv.extend(rows, np.maximum(ends, slots.write_from.take(rows)) if sel.forks else ends)
        slots.computed[rows] = ends
        slots.known[rows] += room
        slots.last[rows] = slots.last_plan
        if self.prefixes.fetches is not None:
            self._jobs += self.prefixes.fetches.jobs()
        copies = self.kv.copies([(entry.slot, handle) for entry, handle in sel.forks])
        for entry, _ in sel.forks:
            self.families.seated(entry, slots.last_plan)
        self.prefixes.planned(slots.last_plan)
        plan = StepPlan(
            *(slots.last_plan, rows.astype(np.int32), start, q, room),
            *(slots.write_from.take(rows), slots.flags.take(rows)),
            *(tuple(sel.opened), np.array(self._closing, np.int32), new_blocks, copies, (), tuple(self._jobs)),
        )
        self._flights.append(Flight(plan, rows, slots.ids(rows), slots.closures, self._cached))
        self._unacked.update((job.plugin, job.key) for job in self._jobs)
        slots.free(self._closing)
        self._closing, self._jobs = [], []
        return plan

    def closing(self) -> None:
        """The engine ends, with nothing in flight: end all requests, and plan the last jobs of the connector."""
        self.abort(list(self._entries))
        self.kv.reclaim(self._committed)
        if self.prefixes.fetches is not None:
            self._jobs += self.prefixes.fetches.closing()

    @property
    def has_connector(self) -> bool:
        return self.prefixes.fetches is not None

    def tend(self) -> None:
        """Work that no plan waits for. The loop calls it while the device runs a step."""
        self.prefixes.tend()

    # ---- commit ---------------------------------------------------------------------------------------------------

    def commit(self, plan: StepPlan, result: StepResult) -> Updates:
        """Advance requests by the oldest plan's result, end those that stopped, free what they held.

        Raises EngineDeadError when the result is not that plan's."""
        flight = self._flights.popleft()
        gained = result.offsets[1:] - result.offsets[:-1]
        self._verify(flight, plan, result, gained)
        outcome, live = self._sort_out(flight, result, gained)
        if self._stops.size:
            self._find_stops(flight, result, outcome)
        self._advance(flight, result, outcome, live)
        for slot, entry in flight.drained.items():
            self._drain(flight, slot, entry, result, outcome)
        for ack in result.acks:
            self._acked(ack)
        self._committed = plan.plan_id
        self.kv.reclaim(plan.plan_id)
        return self._report(flight, result, outcome, live)

    def _verify(self, flight: Flight, plan: StepPlan, result: StepResult, gained: np.ndarray) -> None:
        expected = flight.plan.plan_id
        if plan.plan_id != expected or result.plan_id != expected:
            raise EngineDeadError(f"step {expected} is the oldest in flight, got plan {plan.plan_id} and result {result.plan_id}")
        if gained.size != flight.rows.size:
            raise EngineDeadError(f"the result of step {expected} has {gained.size} rows, the plan has {flight.rows.size}")
        if gained.tobytes() != flight.plan.room.tobytes() and ((gained > flight.plan.room) | (gained < 0)).any():
            raise EngineDeadError(f"the result of step {expected} has more tokens than the plan has room for")

    def _owner(self, flight: Flight, slot: int) -> Entry | None:
        """Who had the slot in that plan, unless it ended since."""
        entry = flight.drained.get(slot)
        if entry is None and self.slots.since[slot] <= flight.plan.plan_id:
            entry = self.slots.entries[slot]
        return None if entry is None or entry.state is State.ENDED else entry

    def _sort_out(self, flight: Flight, result: StepResult, gained: np.ndarray) -> tuple[columns.Outcome, np.ndarray | None]:
        """Fail and recompute what the workers say; then which rows (None: all) still belong to their request."""
        for slot, reason in result.failed:
            entry = self._owner(flight, slot)
            if entry is not None:
                self.prefixes.spoilt(entry)
                self.fail(entry, reason)
        if result.oversized and flight.plan.plan_id > self._limited_at:
            self._oversized(flight)
        for slot, good in result.lost:
            entry = self._owner(flight, slot)
            if entry is not None:
                if not (flight.plan.start[flight.rows == slot] <= good).any():
                    self.prefixes.spoilt(entry)
                self._recompute(flight, entry)
        outcome = columns.Outcome.of(flight.ids, self.slots.known_done.take(flight.rows), gained)
        if self.slots.closures == flight.closures:
            return outcome, None
        live = self.slots.since.take(flight.rows) <= flight.plan.plan_id
        if live.all():
            return outcome, None
        outcome.kept, outcome.whole = np.where(live, gained, 0), False
        return outcome, np.flatnonzero(live)

    def _oversized(self, flight: Flight) -> None:
        """Plan smaller steps from now on; a step that cannot be smaller ends its request."""
        tokens = int(flight.plan.q.sum())
        if tokens > 1:
            self._limit(tokens // 2)
            logger.warning(
                "the device has no memory for a step of %d tokens: its requests are computed again, %d tokens a step at most; "
                "lower engine.memory_fraction, engine.max_tokens_per_step or engine.max_requests",
                *(tokens, self.selector.budget),
            )
        else:
            for entry in filter(None, (self._owner(flight, slot) for slot in flight.rows.tolist())):
                self.fail(entry, TOO_LARGE)

    def _recompute(self, flight: Flight, entry: Entry) -> None:
        """Some of its KV is lost: start again with its committed tokens, and drop what was computed from the loss."""
        if entry.state is State.RUNNING:
            self.preemptions += 1
            self._take_back(entry)
        for other in (flight, *self._flights):
            other.drained = {slot: drained for slot, drained in other.drained.items() if drained is not entry}
        entry.inflight = 0
        self.queue.push(entry)

    def _find_stops(self, flight: Flight, result: StepResult, outcome: columns.Outcome) -> None:
        for hit in self._stops.hits(result.tokens):
            row = int(np.searchsorted(result.offsets, hit, "right")) - 1
            entry, token = self.slots.entries[flight.rows[row]], int(result.tokens[hit])
            if entry is None or not outcome.kept[row] or outcome.finish[row] or token not in entry.request.stop_ids:
                continue
            outcome.end(row, STOP, token)
            if hit + 1 < result.offsets[row + 1]:
                outcome.keep(row, hit + 1 - int(result.offsets[row]))

    def _advance(self, flight: Flight, result: StepResult, outcome: columns.Outcome, live: np.ndarray | None) -> None:
        """Committed counts and tokens of the live rows; bounds lose what was planned and not gained."""
        slots, rows, room, computed = self.slots, flight.rows, flight.plan.room, result.computed
        before, kept, tokens = outcome.before, outcome.kept, columns.kept_tokens(outcome, result)
        if live is not None:
            rows, room, computed, before, kept = (a[live] for a in (rows, room, computed, before, kept))
        if self.allocation.draft_width:
            slots.width[rows] = result.drafts if live is None else result.drafts[live]
        known = before + kept
        slots.store(rows, before, kept, tokens)
        slots.known_done[rows] = known
        slots.computed_done[rows] = computed
        if kept.tobytes() != room.tobytes():
            slack = room - kept
            slots.known[rows] -= slack
            slots.computed[rows] -= slack
        if result.prompt_logprobs is not None:
            self._report_prompts(flight, result, outcome, live)
        for leader in list(self.families.computing):
            if slots.computed_done[leader.slot] >= leader.num_prompt:
                for sibling in self.families.computed(leader, slots.last_plan):
                    self.open_gate(sibling.request.id, GATE)
        self.kv.commit(rows, computed, slots.last_plan)
        self.prefixes.committed()
        full = (known >= slots.max_len.take(rows)).nonzero()[0]
        if full.size:
            full = full if live is None else live[full]
            outcome.finish[full] = np.where(outcome.finish[full], outcome.finish[full], LENGTH)
        ended = outcome.finish.nonzero()[0]
        if ended.size:
            self.prefixes.ending(flight.rows[ended])
        for row in ended.tolist():
            entry = self.slots.entries[flight.rows[row]]
            assert entry is not None
            self._end(entry, int(outcome.finish[row]))

    def _report_prompts(self, flight: Flight, result: StepResult, outcome: columns.Outcome, live: np.ndarray | None) -> None:
        """Prompt logprobs go out once, also when a preempted prompt is computed again."""
        logprobs, slots = result.prompt_logprobs, self.slots
        assert logprobs is not None
        outcome.reported = np.full(flight.rows.size, self.allocation.max_model_len, np.int32)
        rows = np.arange(flight.rows.size) if live is None else live
        outcome.reported[rows] = slots.reported[flight.rows[rows]]
        inside = np.isin(logprobs.row, rows)
        np.maximum.at(slots.reported, flight.rows[logprobs.row[inside]], logprobs.position[inside])

    def _drain(self, flight: Flight, slot: int, entry: Entry, result: StepResult, outcome: columns.Outcome) -> None:
        """A request preempted since this plan was made keeps the tokens of its row, and may end with them."""
        if entry.state is State.ENDED:
            return
        row = int(np.flatnonzero(flight.rows == slot)[0])
        outcome.before[row] = entry.tokens.size
        kept, code, stop = entry.accept(result.tokens[result.offsets[row] : result.offsets[row + 1]])
        outcome.keep(row, kept)
        entry.inflight -= 1
        if code != RUNNING:
            outcome.end(row, code, stop)
            self._end(entry, code)
        elif not entry.inflight:
            self.queue.push(entry)

    def _report(self, flight: Flight, result: StepResult, outcome: columns.Outcome, live: np.ndarray | None) -> Updates:
        updates = columns.build(outcome, result, flight.cached)
        if result.outputs:
            rows = range(flight.rows.size) if live is None else live.tolist()
            owner = {int(flight.rows[row]): flight.ids[row] for row in rows}
            outputs = tuple((owner[slot], name, array) for slot, name, array in result.outputs if slot in owner)
            updates = replace(updates, outputs=outputs)
        if self._events.ids:
            events, self._events = self._events, columns.Events()
            updates = events.append_to(updates)
        return updates

    # ---- checks ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise AssertionError unless every count is right; the loop calls it when it becomes idle, tests after every step."""
        self.kv.check()
        slots = self.slots
        for entry in self._entries.values():
            assert (entry.slot >= 0) == (entry.state is State.RUNNING), f"{entry.request.id} is {entry.state} in {entry.slot}"
            assert entry.slot < 0 or slots.entries[entry.slot] is entry, f"slot {entry.slot} is somebody else's"
        rows = slots.rows
        assert rows.size == sum(entry.slot >= 0 for entry in self._entries.values()), "a slot is lost"
        assert rows.size + slots.available + len(self._closing) == self.allocation.max_slots, "a slot is lost"
        assert len(self.queue) == sum(e.state is State.WAITING for e in self._entries.values()), "the queue miscounts"
        assert (slots.computed_done[rows] <= slots.computed[rows]).all(), "committed more than planned"
        assert (slots.known_done[rows] <= slots.known[rows]).all(), "known more than planned"
        if not self._flights:
            assert (slots.known[rows] == slots.known_done[rows]).all(), "a bound is not settled"
            assert (slots.computed[rows] == slots.computed_done[rows]).all(), "a bound is not settled"
