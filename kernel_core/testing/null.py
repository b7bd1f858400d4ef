"""A device that computes nothing: tokens are a function of (key, position), KV is a fingerprint of the tokens before it.

It obeys plans as a real worker does (slots, true counts, block tables, copies, masked writes), checks that they are legal,
and, with `check_kv`, that every position a row attends to is where its table says and belongs to the row's own tokens (and to its
payload "identity"). So a wrongly shared, freed or reused block is found without a model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np

from kernel_core.errors import EngineDeadError
from kernel_core.plan import Ack, Allocation, Capabilities, KVGroup, Opened, StepPlan, StepResult, WorkerReport

GROUP = KVGroup("full", 16, 1, ("null",))
_NOWHERE = np.uint32(0)


def null_tokens(keys: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """The tokens at `positions` [n] of requests with these keys [n] or []: int32 [n]."""
    with np.errstate(over="ignore"):
        x = np.asarray(positions).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.asarray(keys, np.uint64)
        x = (x ^ (x >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        return ((x ^ (x >> np.uint64(32))) % np.uint64(vocab_size)).astype(np.int32)


@dataclass(slots=True)
class NullScript:
    """What goes wrong or ragged, by request id. accept(key, position) → drafts accepted by the row that decides `position`.
    fail and lose: {request id: (position, ...)}: the row that decides it fails, or loses all KV, once per entry."""

    accept: Callable[[int, int], int] = lambda key, position: 0
    drafts: Callable[[int, int], int] | None = None  # (key, known tokens) → drafts that wait then; None: as many as may be
    fail: Mapping[str, int] | None = None
    lose: Mapping[str, int] | None = None
    bad_jobs: frozenset[str] = frozenset()
    worker_parts: Mapping[str, Callable[[list[np.ndarray], bytes], None]] | None = None  # by plugin: (KV by group, data) → a job
    ack_after: int = 0  # plans that pass before a job is acked
    die_at: int | None = None  # plan id


class NullDevice:
    """One worker's state. `tables`: per group [slots, columns]; `kv`: per group a fingerprint per block position."""

    def __init__(
        self, groups: Sequence[KVGroup], allocation: Allocation, vocab_size: int, script: NullScript, check: bool
    ) -> None:
        self.groups, self.vocab_size, self.script, self.check_kv = groups, vocab_size, script, check
        self.allocation = allocation
        slots, length = allocation.max_slots, allocation.max_model_len
        self.opened: dict[int, Opened] = {}
        self.known, self.computed = np.zeros(slots, np.int32), np.zeros(slots, np.int32)
        self.keys, self.waiting = np.zeros(slots, np.uint64), np.zeros(slots, np.int32)
        self.prints = np.zeros((slots, length + 1 if check else 0), np.uint32)  # fingerprints of known tokens
        self.tables, self.kv = [], []
        for group, blocks in zip(groups, allocation.num_blocks):
            size = group.block_size or length
            longest = length + max(allocation.draft_width, allocation.draft_ahead)
            self.tables.append(np.zeros((slots, -(-longest // size)), np.int32))
            self.kv.append(np.zeros(blocks * size if check else 0, np.uint32))
        self._jobs: deque[tuple[int, Ack]] = deque()
        self._lost: set[str] = set()

    def run(self, plan: StepPlan) -> StepResult:
        if self.script.die_at == plan.plan_id:
            raise EngineDeadError("the null worker died")
        self._prepare(plan)
        rows = plan.rows
        self._verify(plan)
        first = self.known[rows]
        gained = np.minimum(plan.room, 1)
        if (plan.room > 1).any():
            accepted = [self.script.accept(int(self.keys[s]), int(p)) for s, p in zip(rows, first)]
            gained = np.minimum(plan.room, np.minimum(accepted, self.waiting[rows]) + 1)
        failed, lost = self._accidents(plan)
        if failed:
            gained = np.where(np.isin(rows, [slot for slot, _ in failed]), 0, gained)
        offsets = np.zeros(rows.size + 1, np.int32)
        np.cumsum(gained, out=offsets[1:])
        position = np.arange(offsets[-1]) + np.repeat(first - offsets[:-1], gained)
        tokens = null_tokens(self.keys[np.repeat(rows, gained)], position, self.vocab_size)
        if self.check_kv:
            self._forward(plan, tokens, offsets)
        self.known[rows] += np.maximum(gained, plan.room > 0)  # a failed row goes on with any token
        self.computed[rows] += np.where(plan.room > 0, plan.q - plan.room + np.maximum(gained, 1), plan.q)
        drafted = np.minimum(np.maximum(plan.room - 1, 0), self.waiting[rows])
        drafts = self.waiting[rows] = self._drafts(plan)
        return StepResult(
            *(plan.plan_id, tokens, offsets, self.computed[rows], drafted, np.maximum(gained - 1, 0), drafts),
            acks=self._acks(plan),
            lost=lost,
            failed=failed,
        )

    def _drafts(self, plan: StepPlan) -> np.ndarray:
        """How many drafts wait for the next step of each row."""
        width = self.allocation.draft_width
        if not width or self.script.drafts is None:
            return np.where(plan.room > 0, width, 0).astype(np.int32)
        wanted = [self.script.drafts(int(self.keys[slot]), int(self.known[slot])) for slot in plan.rows]
        return np.where(plan.room > 0, np.minimum(wanted, width), 0).astype(np.int32)

    # ---- slots and blocks -----------------------------------------------------------------------------------------

    def _prepare(self, plan: StepPlan) -> None:
        for slot in plan.closed.tolist():
            del self.opened[slot]
            for table in self.tables:
                table[slot] = 0
        for opened in plan.opened:
            slot = opened.slot
            assert slot not in self.opened and slot not in plan.closed, f"slot {slot} is in use"
            self.opened[slot], self.waiting[slot] = opened, 0
            self.known[slot], self.computed[slot], self.keys[slot] = opened.token_ids.size, opened.computed, opened.key % 2**64
            if self.check_kv:
                before = np.uint32(crc32(opened.payloads.get("identity", b"")) | 1)
                self.prints[slot, : opened.token_ids.size + 1] = fingerprints(before, opened.token_ids)
        for table, update in zip(self.tables, plan.new_blocks):
            table[update.slots, update.columns] = update.ids
        for job in plan.jobs if self.check_kv else ():
            if self.script.worker_parts and job.plugin in self.script.worker_parts:
                self.script.worker_parts[job.plugin](self.kv, job.data)
        if self.check_kv:
            for kv, copies in zip(self.kv, plan.copies):
                kv[copies.dst] = kv[copies.src]

    def _verify(self, plan: StepPlan) -> None:
        """The plan keeps the contract."""
        rows, room = plan.rows, plan.room
        assert np.unique(rows).size == rows.size and all(slot in self.opened for slot in rows.tolist()), "rows are wrong"
        assert (plan.q > 0).all() and (room >= 0).all(), "an empty row"
        todo = self.known[rows] - self.computed[rows]
        assert (plan.q - np.maximum(room - 1, 0) <= todo).all(), "more is planned than is known"
        assert ((room == 0) | (todo == plan.q - room + 1)).all(), "a row samples before it has computed what it knows"
        assert (plan.start >= self.computed[rows]).all(), "start is no upper bound"

    def _forward(self, plan: StepPlan, tokens: np.ndarray, offsets: np.ndarray) -> None:
        for i, slot in enumerate(plan.rows.tolist()):
            start, known = int(self.computed[slot]), int(self.known[slot])
            new = tokens[offsets[i] : offsets[i + 1]]
            self.prints[slot, known : known + new.size + 1] = fingerprints(self.prints[slot, known], new)
            accepted = max(new.size - 1, 0)
            end = start + int(plan.q[i]) - max(int(plan.room[i]) - 1, 0)
            for g, group in enumerate(self.groups):
                self._attend(g, group, slot, start, end + accepted, int(plan.write_from[i]))
                planned = int(plan.start[i] + plan.q[i])
                whole = not 0 < group.block_size < self.allocation.max_model_len
                ahead = self.allocation.draft_ahead if plan.room[i] and not whole else 0
                self._scribble(g, group, slot, end + accepted, planned + ahead)

    def _where(self, g: int, group: KVGroup, slot: int, positions: np.ndarray) -> np.ndarray:
        size = group.block_size or self.prints.shape[1] - 1
        blocks = self.tables[g][slot, positions // size]
        assert (blocks > 0).all(), f"slot {slot} has no block at positions {positions[blocks == 0][:4]} of group {g}"
        return blocks.astype(np.int64) * size + positions % size

    def _attend(self, g: int, group: KVGroup, slot: int, start: int, end: int, write_from: int) -> None:
        """Write positions [start, end) but those below `write_from`; then all that the first of them on see must be right."""
        written = np.arange(max(start, write_from), end)
        self.kv[g][self._where(g, group, slot, written)] = self.prints[slot, written + 1]
        first = 0 if group.kind == "full" or group.window is None else max(start - group.window + 1, 0)
        seen = np.arange(first, end)
        wrong = self.kv[g][self._where(g, group, slot, seen)] != self.prints[slot, seen + 1]
        request = self.opened[slot].request_id
        assert not wrong.any(), f"{request} reads foreign KV at positions {seen[wrong][:4]} of group {g}"

    def _scribble(self, g: int, group: KVGroup, slot: int, start: int, end: int) -> None:
        """Rejected drafts, and what a drafter writes ahead, leave rubbish in positions that are not computed."""
        if end > start:
            self.kv[g][self._where(g, group, slot, np.arange(start, end))] = _NOWHERE

    # ---- accidents ------------------------------------------------------------------------------------------------

    def _accidents(self, plan: StepPlan) -> tuple[tuple[tuple[int, str], ...], tuple[tuple[int, int], ...]]:
        failed, lost = [], []
        if not self.script.fail and not self.script.lose:
            return (), ()
        for slot, room in zip(plan.rows.tolist(), plan.room.tolist()):
            name, known = self.opened[slot].request_id, int(self.known[slot])
            if room and known >= (self.script.fail or {}).get(name, known + 1):
                failed.append((slot, "logits are not finite"))
            elif room and name not in self._lost and known >= (self.script.lose or {}).get(name, known + 1):
                self._lost.add(name)
                lost.append((slot, 0))
        return tuple(failed), tuple(lost)

    def _acks(self, plan: StepPlan) -> tuple[Ack, ...]:
        for job in plan.jobs:
            error = "the job failed" if job.key in self.script.bad_jobs else None
            self._jobs.append((plan.plan_id + self.script.ack_after, Ack(job.plugin, job.key, error)))
        due = []
        while self._jobs and self._jobs[0][0] <= plan.plan_id:
            due.append(self._jobs.popleft()[1])
        return tuple(due)


def fingerprints(before: np.uint32, tokens: np.ndarray) -> np.ndarray:
    """[len(tokens) + 1] uint32: element i stands for everything before token i. Never 0."""
    out = [int(before)]
    for token in tokens.tolist():
        out.append(((out[-1] ^ (token + 0x9E3779B9)) * 0x85EBCA6B + 1) % 2**32 or 1)
    return np.array(out, np.uint32)


@dataclass(slots=True)
class NullHandle:
    """Runs its plan, and those before it, when it is asked: as late as a device may."""

    executor: NullExecutor
    plan: StepPlan

    def result(self) -> StepResult:
        return self.executor.finish(self.plan)


class NullExecutor:
    """The executor of a `NullDevice`. For tests and for measuring the engine without a model."""

    def __init__(
        self,
        groups: Sequence[KVGroup] = (GROUP,),
        vocab_size: int = 1000,
        max_model_len: int = 4096,
        draft_width: int = 0,
        capabilities: Capabilities | None = None,
        script: NullScript | None = None,
        check_kv: bool = False,
        kv_budget_bytes: int = 1 << 16,
        draft_ahead: int = 0,
        lookback: int = 0,
    ) -> None:
        self.report = WorkerReport(
            *(tuple(groups), kv_budget_bytes, capabilities or Capabilities(), vocab_size, max_model_len),
            *(draft_width, draft_ahead, lookback),
        )
        self.script, self.check_kv = script or NullScript(), check_kv
        self.device: NullDevice | None = None
        self._queue: deque[StepPlan] = deque()
        self._results: dict[int, StepResult] = {}

    def start(self) -> WorkerReport:
        return self.report

    def allocate(self, allocation: Allocation) -> None:
        self.device = NullDevice(self.report.groups, allocation, self.report.vocab_size, self.script, self.check_kv)

    def submit(self, plan: StepPlan) -> NullHandle:
        self._queue.append(plan)
        return NullHandle(self, plan)

    def finish(self, plan: StepPlan) -> StepResult:
        """Run what was submitted up to this plan, in order."""
        if self.device is None:
            raise EngineDeadError("the null executor was not allocated or is closed")
        while plan.plan_id not in self._results:
            first = self._queue.popleft()
            self._results[first.plan_id] = self.device.run(first)
        return self._results.pop(plan.plan_id)

    def call(self, method: str, payload: bytes) -> list[bytes]:
        return [payload]

    def close(self) -> None:
        self.device = None
