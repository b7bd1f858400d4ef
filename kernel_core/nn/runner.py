"""One step on one rank: jobs and copies, step inputs, forward, host turn, sample and verify, propose.

The runner is an assembly of parts; a device replaces a part by name (`Device.runner_parts`) and never copies the runner:

    block_tables  (num_groups, max_slots, max_len, block_size, device) → like `slots.BlockTables`
    step_inputs   (slots, tables, groups, tree) → like `inputs.StepInputBuilder`
    graphs        (module, *others whose weights it reads) → callable as the module, Forward and further tensors → tensors that
                  are the caller's, e.g. one that replays captured graphs; for the model and for the layers of a drafter
    sampler       (slots, vocab_size, logprobs_mode) → like `sampler.Sampler`
    small_ops     () → a context manager, entered for what a step computes after the model
    mask          () → like `transforms.mask_bits`
    acceptance    (slots, tables, kv, tree) → like `verify.Acceptance`
    drafting      (slots, tables, kv, tree, the drafter's layers, vocab_size) → like `passes.Drafting`
    steady        (runner) → None, or callable StepPlan → None (not such a step), or an object with `arrays()` like
                  `transfer.Download`: does a whole step of rows that compute and gain one token each, as the runner would
                  without a drafter (`Runner.is_steady` says which those are), and gives "tokens" [R, 1], "numbers" [5, R] and
                  "bad" [R]; perhaps `timings`, seconds of its phases
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_core.errors import ConfigError, PluginError
from kernel_core.nn.inputs import Layout, Step, StepInputBuilder
from kernel_core.nn.kv import KVStore
from kernel_core.nn.logprobs import LogprobColumns, prompt_logprobs
from kernel_core.nn.passes import Drafting
from kernel_core.nn.pending import Pending
from kernel_core.nn.protocols import Drafter, Forward, LogitsTransform, LongJob, Model, StepInputs
from kernel_core.nn.sampler import Sampled, Sampler
from kernel_core.nn.slots import BlockTables, SlotTable
from kernel_core.nn.transfer import Download
from kernel_core.nn.transforms import MaskRows, Transforms, mask_bits
from kernel_core.nn.verify import Acceptance, Verified
from kernel_core.plan import PROMPT_LOGPROBS, Ack, Allocation, Job, StepPlan

PARTS: Mapping[str, Callable[..., Any]] = {
    "block_tables": BlockTables,
    "step_inputs": StepInputBuilder,
    "graphs": lambda module, *others: module,
    "sampler": Sampler,
    "mask": lambda: mask_bits,
    "small_ops": nullcontext,
    "acceptance": Acceptance,
    "drafting": Drafting,
    "steady": lambda runner: None,
}
logger = logging.getLogger("kernel_core")
Jobs = Mapping[str, Callable[[bytes], Any]]  # by plugin: what its worker part does with a job; a LongJob goes on
WEIGHINGS = 8
UNREAD = 64  # tokens whose states nobody reads, at least, for a model to be told
IDLE_WAIT = 0.02  # seconds that a step without rows waits for such a job


class Runner:
    """Runs plans in order. The slots' true state lives on the device, so a plan may be submitted before the results of
    the ones before it are read."""

    def __init__(
        self,
        model: Model,
        kv: KVStore,
        allocation: Allocation,
        *,
        vocab_size: int,
        logprobs_mode: str = "raw_logprobs",
        transforms: Sequence[LogitsTransform] = (),
        step_inputs: Sequence[StepInputs] = (),
        drafter: Drafter | None = None,
        draft_layers: frozenset[str] = frozenset(),
        jobs: Jobs | None = None,
        parts: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        parts = _assemble(parts or {})
        width, slots, length = allocation.draft_width, allocation.max_slots, allocation.max_model_len
        self.model, self.kv, self.device, self.vocab_size = model, kv, kv.device, vocab_size
        self.slots = SlotTable(slots, length, width, self.device)
        block_size = kv.groups[0].block_size if kv.groups else 1
        most = length + max(width, allocation.draft_ahead)
        self.tables = parts["block_tables"](len(kv.groups), slots, most, block_size, self.device)
        self.tree = bool(drafter and drafter.tree)
        self.inputs = parts["step_inputs"](self.slots, self.tables, kv.groups, self.tree)
        self.graphs = parts["graphs"](model)
        self.sampler = parts["sampler"](self.slots, vocab_size, logprobs_mode)
        self.mode, self.drafter, self.jobs = logprobs_mode, drafter, jobs or {}
        self.transforms = Transforms(transforms, slots + 1, width, vocab_size, parts["mask"]())
        self.step_inputs = _owned(step_inputs)
        self.layers = frozenset(kv.specs) - draft_layers  # the model's own
        self.acceptance = parts["acceptance"](self.slots, self.tables, kv, self.tree)
        self.drafting = parts["drafting"](self.slots, self.tables, kv, self.tree, draft_layers, vocab_size)
        self._going_on: list[tuple[Job, LongJob]] = []
        self._unsettled: list[Pending] = []  # steps whose outcome host transforms have not learnt yet
        self._lost = np.zeros(slots, bool)  # slots with a row that was not computed; plans name them until they are closed
        self._small_ops = parts["small_ops"]
        self._steady = parts["steady"](self)

    # ---- the step

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> Pending:
        """Start a step. On a device that runs by itself nothing here waits for it, but for host transforms and drafters.

        When the device has no memory for it, its rows are lost, and with them those of the same slots in later plans."""
        rows, length = len(plan.rows), self.drafter.length if self.drafter else None
        if length and rows and length.unweighed(rows):
            length.weighed(rows, self._weigh(rows))
        clock = _Clock()
        acks = self._apply(plan)
        kept, asked = ~self._lost[plan.rows], not length or length.asks(plan)
        pending = self._attempted(plan if kept.all() else plan.only(kept), acks, clock, self.drafter if asked else None)
        if pending is None:
            self._lost[plan.rows] = True
            kept[:] = False
            pending = Pending(plan.only(kept), acks=acks, timings=clock.done(), settle=self.settle, oversized=True)
        if not kept.all():
            pending.whole = (plan, kept)
        pending.started = clock.started
        if length and pending.download is not None and (asked or length.rest(rows)):
            pending.observe = length.observe
        return pending

    def _attempted(self, plan: StepPlan, acks: tuple[Ack, ...], clock: _Clock, drafter: Drafter | None) -> Pending | None:
        """None: there was no memory for it. Whatever it did to its slots is undone when they are opened again."""
        try:
            return self._run(plan, acks, clock, drafter)
        except torch.OutOfMemoryError as error:
            logger.warning("no memory for a step of %d rows and %d tokens: %s", len(plan.rows), int(plan.q.sum()), str(error))
            return None

    def is_steady(self, plan: StepPlan) -> bool:
        """Does every row compute one token and gain one, and does nothing of its request need more than the model and a draw?"""
        rows = np.asarray(plan.rows, np.int64)
        return bool(
            (plan.q == 1).all()
            and (plan.room == 1).all()
            and (plan.write_from <= plan.start).all()
            and (self.slots.host["logprobs"][rows] < 0).all()
            and not (np.asarray(plan.flags) & PROMPT_LOGPROBS).any()
            and not self.transforms.active(rows, host=True)
            and not self.transforms.active(rows, host=False)
        )

    def _weigh(self, rows: int) -> float:
        """Seconds that steady steps save, by a few steps of the slot that is nobody's, done in both ways."""
        if self._steady is None:
            return 0.0
        one, none = np.ones(rows, np.int32), np.zeros(rows, np.int32)
        plan, seconds = StepPlan(-1, one * self.slots.padding, none, one, one, none, none), ([], [])
        for steady in (False, True) * WEIGHINGS:
            clock = _Clock()
            self._run(plan, (), clock, None, steady).wait()
            seconds[steady].append(perf_counter() - clock.started)
            self.slots.known[self.slots.padding], self.slots.computed[self.slots.padding] = 1, 0
        return min(seconds[False]) - min(seconds[True])

    def _run(self, plan: StepPlan, acks: tuple[Ack, ...], clock: _Clock, drafter: Drafter | None, steady: bool = True) -> Pending:
        if not len(plan.rows):
            return Pending(plan, acks=acks, timings=clock.done(), settle=self.settle)
        if drafter is None and steady and self._steady is not None and (download := self._steady(plan)) is not None:
            timings = clock.done(getattr(download, "timings", None))
            return Pending(plan, download=download, acks=acks, timings=timings, settle=self.settle)
        step = self.inputs.build(plan)
        forward = self._forward_arguments(step)
        forward.tapped = bool(drafter and drafter.taps)
        if drafter is None or not drafter.lookback:
            forward.read = self._read(step)
        clock.lap("inputs")
        hidden = self.graphs(forward)
        clock.lap("forward")
        prompt = prompt_logprobs(plan, step.layout, self.slots, hidden, self.model.logits, self.sampler.rank, self.vocab_size)
        masks = self._host_turn(step.layout)
        narrowed = forward.read is not None and len(hidden) == len(forward.read)
        with self._small_ops():
            sampled = self._sample(step, hidden if narrowed else hidden[step.logits_token], masks)
            verified = self.acceptance(step, sampled)
            clock.lap("sample")
            waiting = None
            if drafter is not None:
                view = self.drafting.view(step, verified, hidden, forward.taps)
                waiting = self.drafting.keep(view, *drafter.propose(view))
            clock.lap("propose")
        download = Download(self._report(step, verified, waiting, sampled, prompt), self.device)
        logprobs = sampled.logprobs if sampled else None
        pending = Pending(plan, step.layout, download, logprobs, prompt, acks, clock.done(), self.settle)
        pending.asked = drafter is not None
        if self.transforms.has_host:
            pending.reasons = dict(self.transforms.failed)
            self._unsettled.append(pending)
        return pending

    def settle(self, pending: Pending) -> None:
        """Let host transforms learn of all steps up to this one."""
        while self._unsettled and self._unsettled[0].plan.plan_id <= pending.plan.plan_id:
            self._learn(self._unsettled.pop(0))

    def _learn(self, pending: Pending) -> None:
        for row, slot in enumerate(pending.plan.rows.tolist()):
            if self.transforms.watches_on_host(slot):
                host = pending.wait()
                gained = host["tokens"][row, : host["numbers"][0, row]]
                self.transforms.learn(slot, gained, host["drafts"][row], host["parents"][row])

    # ---- before the forward

    def _apply(self, plan: StepPlan) -> tuple[Ack, ...]:
        """Closed and opened slots, new blocks, jobs, copies."""
        if plan.encode or plan.payloads:
            raise PluginError("the plan carries encoder work or step payloads, and no part of this worker takes them")
        if len(plan.closed) or plan.opened:
            self._settle_all()
            self._open_and_close(plan)
        self.tables.update(plan.new_blocks)
        acks = self._run_jobs(plan) if plan.jobs or self._going_on else ()
        self.kv.copy_planned(plan.copies)
        return acks

    def _settle_all(self) -> None:
        if self._unsettled:
            self.settle(self._unsettled[-1])

    def _open_and_close(self, plan: StepPlan) -> None:
        drafter = self.drafter
        listeners = [*self.step_inputs, *(part for part in (drafter, drafter and drafter.length) if part is not None)]
        self._lost[plan.closed] = False
        for slot in plan.closed.tolist():
            self.transforms.close(slot)
            for part in listeners:
                part.closed(slot)
        if plan.opened:
            self.slots.open(plan.opened)
            self.tables.open(np.array([item.slot for item in plan.opened]))
        for item in plan.opened:
            self.transforms.open(item)
            for part in listeners:
                part.opened(item)

    def _run_jobs(self, plan: StepPlan) -> tuple[Ack, ...]:
        """Begin the plan's jobs → acks of those that are done, earlier ones included."""
        acks = []
        for job in plan.jobs:
            ack, going_on = self._run_job(job)
            if isinstance(going_on, LongJob):
                self._going_on.append((job, going_on))
            else:
                acks.append(ack)
        wait = 0.0 if len(plan.rows) else IDLE_WAIT
        done = [item for item in self._going_on if item[1].done(wait)]
        self._going_on = [item for item in self._going_on if item not in done]
        return (*acks, *(_attempt(job, long_job.finish)[0] for job, long_job in done))

    def _run_job(self, job: Job) -> tuple[Ack, Any]:
        handler = self.jobs.get(job.plugin)
        if handler is None:
            return Ack(job.plugin, job.key, f"plugin {job.plugin!r} takes no jobs: it registers no call named 'job'"), None
        return _attempt(job, lambda: handler(job.data))

    def _forward_arguments(self, step: Step) -> Forward:
        named: dict[str, Tensor] = {}
        for owner in self.step_inputs:
            named.update(owner.fill(step.view))
        step.view.positions = named.pop("positions", step.view.positions)
        positions = step.view.positions
        return Forward(
            token_ids=step.view.token_ids,
            positions=positions[0] if positions.dim() == 2 and len(positions) == 1 else positions,
            kv=self.kv.kv,
            attention=self.kv.plans(step.attention, self.layers),
            inputs=named,
        )

    def _read(self, step: Step) -> Tensor | None:
        """The tokens whose states the step reads, where the others are many."""
        read, flags = step.logits_token, np.asarray(step.plan.flags)
        if len(step.view.token_ids) - len(read) < UNREAD or self.step_inputs or (flags & PROMPT_LOGPROBS).any():
            return None
        return read if len(read) else read.new_zeros(1)

    # ---- after the forward

    def _host_turn(self, layout: Layout) -> list[MaskRows]:
        """Host transforms see what the steps before did; only slots that they watch make the host wait."""
        if not self.transforms.active(layout.logits_slot, host=True):
            return []
        self._settle_all()
        return self.transforms.host_turn(layout)

    def _sample(self, step: Step, hidden: Tensor, masks: Sequence[MaskRows]) -> Sampled | None:
        layout = step.layout
        if not len(layout.logits_row):
            return None
        logits = self.model.logits(hidden)
        asked = self.slots.host["logprobs"][layout.logits_slot] >= 0
        greedy = self.slots.host["temperature"][layout.logits_slot] == 0
        only_argmax = greedy & ~asked if self.mode.startswith("processed") else greedy
        return self.sampler(logits, step.view, layout, self.transforms.step(layout, masks, only_argmax))

    def _report(
        self, step: Step, verified: Verified, waiting: Tensor | None, sampled: Sampled | None, prompt: LogprobColumns | None
    ) -> dict[str, Tensor]:
        """The device tensors that the result is made of."""
        out = self.acceptance.report(step, verified, waiting)
        if sampled is not None and sampled.logprobs is not None:
            out |= sampled.logprobs.tensors("logprobs.") | {"known": step.known, "order": _path_order(verified.path)}
        if prompt is not None:
            out |= prompt.tensors("prompt.")
        if self.transforms.has_host:
            rows = step.view.rows
            out |= {"drafts": self.slots.drafts[rows], "parents": self.slots.parents[rows]}
        return out


def _path_order(path: Tensor) -> Tensor:
    """path [R, m] → [R, 1 + m]: how many drafts were accepted up to each place, -1: not on the path."""
    rows, width = path.shape
    order = torch.full((rows, 2 + width), -1, dtype=torch.int64, device=path.device)
    order[:, 0] = 0
    place = torch.where(path >= 0, path + 1, 1 + width)
    order.scatter_(1, place, torch.arange(1, width + 1, device=path.device).expand(rows, -1))
    return order[:, : 1 + width]


def _assemble(replaced: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    unknown = set(replaced) - set(PARTS)
    if unknown:
        raise PluginError(f"the device replaces runner parts {sorted(unknown)}; there are only {sorted(PARTS)}")
    return {**PARTS, **replaced}


def _owned(step_inputs: Sequence[StepInputs]) -> Sequence[StepInputs]:
    names = [name for owner in step_inputs for name in owner.names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"two plugins own the step inputs {twice}; a name has one owner")
    return step_inputs


class _Clock:
    """Host seconds of the phases of a step; on a device that runs by itself, the seconds of launching them."""

    def __init__(self) -> None:
        self.started = self._last = perf_counter()
        self._laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = perf_counter()
        self._laps[name], self._last = now - self._last, now

    def done(self, laps: Mapping[str, float] | None = None) -> dict[str, float]:
        return {**self._laps, **(laps or {}), "total": perf_counter() - self.started}


def _attempt(job: Job, work: Callable[[], Any]) -> tuple[Ack, Any]:
    """Its ack, and what it returned."""
    try:
        return Ack(job.plugin, job.key), work()
    except Exception as error:  # noqa: BLE001 - a failed job ends its request, not the worker
        return Ack(job.plugin, job.key, f"{type(error).__name__}: {error}"), None
