"""The runner parts around a forward, with numpy on the slots' own memory. A step makes some hundred small arrays; as torch ops
they take longer than a small model, and several milliseconds where a large one has emptied the caches. Branching drafts
are left to the kernel's own parts, which say what every array means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kernel_core.api import StepPlan
from kernel_core.nn.api import (
    Acceptance,
    AttentionBatch,
    DraftBatch,
    Drafting,
    DraftView,
    Forward,
    Layout,
    Passes,
    Sampled,
    SlotTable,
    Step,
    StepInputBuilder,
    StepView,
    Verified,
    layout,
)

tensor = torch.from_numpy


def cache_slots(table: np.ndarray, row: np.ndarray, place: np.ndarray, size: int) -> np.ndarray:
    """Cache slots of positions `place` [n] of the rows `row` [n] of a block table, int64 [n]."""
    column = np.minimum(place // size, table.shape[1] - 1)
    return table[row, column].astype(np.int64) * size + place % size


class SlotArrays:
    """The slots' memory, as numpy sees it."""

    def __init__(self, slots: SlotTable) -> None:
        self.tokens, self.known, self.computed = slots.tokens.numpy(), slots.known.numpy(), slots.computed.numpy()
        self.drafts, self.parents, self.max_drafts = slots.drafts.numpy(), slots.parents.numpy(), slots.max_drafts.numpy()


class HostInputs(StepInputBuilder):
    """The part "step_inputs"."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)
        self._host = SlotArrays(self.slots)

    def build(self, plan: StepPlan) -> Step:
        shape = layout(plan)
        if self.tree and shape.width:
            return super().build(plan)
        rows, room, write_from = (np.array(x, np.int64) for x in (plan.rows, plan.room, plan.write_from))
        known, computed, row = self._host.known[rows], self._host.computed[rows], shape.row
        place = computed[row] + shape.index
        tokens = self._host.tokens[rows[row], np.minimum(place, self.slots.max_len)].astype(np.int64)
        number, positions, masked = np.arange(shape.width), place, place < write_from[row]
        drafts = np.where(number < room[:, None] - 1, self._host.drafts[rows, : shape.width], -1)
        if shape.width:
            is_draft, draft = shape.draft >= 0, drafts[row, np.maximum(shape.draft, 0)]
            tokens = np.where(is_draft, np.maximum(draft, 0), tokens)
            positions = np.where(is_draft, known[row] + shape.draft, place)
            masked |= is_draft & (draft < 0)
        lens = (computed + np.asarray(plan.q)).astype(np.int32)
        view = StepView(
            rows=tensor(rows),
            lens=tensor(lens),
            next_token=tensor(self._host.tokens[rows, known - 1].astype(np.int64)),
            token_ids=tensor(tokens),
            positions=tensor(positions)[None],
            q_start=tensor(shape.q_start.astype(np.int32)),
            slot=tensor(shape.logits_slot),
            row=tensor(shape.logits_row),
            draft_pos=tensor(shape.logits_draft.astype(np.int32)),
            position=tensor(known[shape.logits_row] + shape.logits_draft),
            ancestors=tensor(np.where(number < shape.logits_draft[:, None], number, -1).astype(np.int32)),
            drafts=tensor(drafts),
            **self.of_slots(shape),
        )
        batches = self._batches(view, shape, rows, place, masked)
        counts = tensor(known), tensor(computed), tensor(room), tensor(write_from)
        parents, paths = self._host.parents[rows, : shape.width], self.chain_paths(len(rows), shape.width)
        return Step(plan, shape, view, batches, *counts, tensor(parents), paths, tensor(shape.logits_token))

    def _batches(
        self, view: StepView, shape: Layout, rows: np.ndarray, place: np.ndarray, masked: np.ndarray
    ) -> list[AttentionBatch]:
        batches, columns = [], self.tables.columns(shape.max_kv)
        for group, own in zip(self.groups, self.tables.tables, strict=True):
            table = np.ascontiguousarray(own.numpy()[rows, :columns])
            slots = tensor(np.where(masked, -1, cache_slots(table, shape.row, place, self.tables.block_size)))
            where = tensor(table), slots, group.block_size, shape.max_q, shape.max_kv
            batches.append(AttentionBatch(view.q_start, view.lens, *where, None, None, shape.fresh))
        return batches


class HostAcceptance(Acceptance):
    """The part "acceptance"."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)
        self._host = SlotArrays(self.slots)

    def __call__(self, step: Step, sampled: Sampled | None) -> Verified:
        if self.tree and step.layout.width:
            return super().__call__(step, sampled)
        alive, width = step.room.numpy() > 0, step.layout.width
        draws, bad = self._draws(step, sampled)
        drafts, order = step.view.drafts.numpy(), np.arange(1 + width)
        right = (drafts == draws[:, :width]) & (drafts >= 0) & alive[:, None]
        accepted = np.logical_and.accumulate(right, 1).sum(1)
        count = np.where(alive, accepted + 1, 0)
        path = np.where(order[:width] < accepted[:, None], order[:width], -1)
        broken = (bad & (order <= accepted[:, None])).any(1) & alive
        self._enter(step, draws, count, accepted)
        return Verified(*(tensor(x) for x in (draws, count, accepted, path, broken)))

    def _draws(self, step: Step, sampled: Sampled | None) -> tuple[np.ndarray, np.ndarray]:
        shape = len(step.plan.rows), 1 + step.layout.width
        draws, bad = np.full(shape, -1, np.int64), np.zeros(shape, bool)
        if sampled is not None:
            place = step.layout.logits_row, step.layout.logits_draft
            draws[place], bad[place] = sampled.draws.numpy(), sampled.bad.numpy()
        return draws, bad

    def _enter(self, step: Step, draws: np.ndarray, count: np.ndarray, accepted: np.ndarray) -> None:
        rows, known, last = step.view.rows.numpy(), step.known.numpy(), self.slots.max_len
        order = np.arange(draws.shape[1])
        place = np.minimum(np.where(order < count[:, None], known[:, None] + order, last), last)
        self._host.tokens[rows[:, None], place] = draws
        self._host.computed[rows] = np.where(count > 0, known + accepted, step.view.lens.numpy())
        self._host.known[rows] = known + count

    def report(self, step: Step, verified: Verified, waiting: Tensor | None) -> dict[str, Tensor]:
        rows, bad = step.view.rows.numpy(), verified.bad.numpy()
        numbers = np.zeros((5, len(rows)), np.int32)
        numbers[0], numbers[1] = verified.count.numpy() * ~bad, verified.accepted.numpy() * ~bad
        numbers[2], numbers[3] = (step.view.drafts.numpy() >= 0).sum(1), self._host.computed[rows]
        if waiting is not None:
            numbers[4] = waiting.numpy()
        return {"tokens": verified.tokens.int(), "numbers": tensor(numbers), "bad": verified.bad}


class HostDrafting(Drafting):
    """The part "drafting"."""

    def __init__(self, *parts: object) -> None:
        super().__init__(*parts)
        self.host = SlotArrays(self.slots)

    def view(self, step: Step, verified: Verified, hidden: Tensor, taps: Mapping[str, Tensor]) -> DraftView:
        if self.tree:
            return super().view(step, verified, hidden, taps)
        rows, accepted = step.view.rows.numpy(), verified.accepted.numpy()
        known, passes = self.host.known[rows], HostPasses(self, step, verified)
        room = np.minimum(np.maximum(self.slots.max_len - known - 1, 0), self.slots.draft_width)
        return DraftView(
            step.view,
            tensor(accepted.astype(np.int32)),
            last_token=tensor(self.host.tokens[rows, known - 1].astype(np.int64)),
            hidden=hidden,
            taps=taps,
            wanted=tensor((np.minimum(room, self.host.max_drafts[rows]) * (step.room.numpy() > 0)).astype(np.int32)),
            known=tensor(known),
            path=passes.path,
            passes=passes,
            **self.on_host(step),
        )

    def keep(self, view: DraftView, tokens: Tensor, parents: Tensor, count: Tensor) -> Tensor:
        if self.tree:
            return super().keep(view, tokens, parents, count)
        drafts, rows, number = tokens.numpy(), view.host_slots, np.arange(self.slots.draft_width)
        most = np.minimum(count.numpy(), view.wanted.numpy())
        live = (number < most[:, None]) & (drafts >= 0) & (drafts < self.vocab_size)
        self.host.drafts[rows], self.host.parents[rows] = np.where(live, drafts, -1), self.slots.chain.numpy()
        return tensor(np.where(live, number + 1, 0).max(1, initial=0))


class HostPasses(Passes):
    """`DraftPasses` of a step whose drafts were a chain."""

    def __init__(self, parts: HostDrafting, step: Step, verified: Verified) -> None:
        self.parts, self.slots, self.step, self.rows = parts, parts.slots, step, step.view.rows
        self._tokens, self._rows = parts.host.tokens, step.view.rows.numpy()
        computed, alive = step.computed.numpy().astype(np.int64), step.room.numpy() > 0
        accepted, lens = verified.accepted.numpy(), step.view.lens.numpy()
        self._computed, self._alive, self._lens = computed, alive, lens
        self._settled = np.where(alive, step.known.numpy(), lens) - computed
        self._counted = self._settled + np.where(alive, accepted, 0)
        self._known = computed + self._counted + 1
        order = np.minimum(np.arange(1 + step.layout.width), accepted[:, None])
        self._path = (step.layout.q_start[:-1] + self._settled - 1)[:, None] + order
        self.known, self.sampled, self.path = tensor(self._known), tensor(alive), tensor(self._path)

    def catch_up(self, shift: int) -> DraftBatch:
        start, q = self.step.layout.q_start, np.diff(self.step.layout.q_start)
        begin = start if shift else start + np.arange(len(start))
        lengths = q if shift else q + 1
        row = np.repeat(np.arange(len(q)), lengths)
        index = np.arange(begin[-1]) - begin[row]
        place = self._computed[row] + index + shift
        valid = (index < self._counted[row] + 1 - shift) & (place >= self.step.write_from.numpy()[row])
        ids = self._tokens[self._rows[row], np.minimum(place, self.slots.max_len)].astype(np.int64)
        bounds = int(lengths.max()), self.step.layout.max_kv + 1
        plans = self._plans(begin.astype(np.int32), self._lens + 1, row, place, valid, *bounds)
        last = tensor(begin[:-1] + self._counted - shift)
        forward = Forward(tensor(ids), tensor(place), self.parts.kv.kv, plans)
        return DraftBatch(forward, tensor(row), last, tensor(self._sources(row, index + shift - 1)))

    def _sources(self, row: np.ndarray, index: np.ndarray) -> np.ndarray:
        settled = self._settled[row]
        beyond = np.clip(index - settled + 1, 0, self._path.shape[1] - 1)
        straight = self.step.layout.q_start[row] + np.maximum(index, 0)
        return np.where(index < settled, straight, self._path[row, beyond])

    def advance(self, tokens: Tensor, number: int) -> DraftBatch:
        drafts, begin = tokens.numpy(), np.arange(len(self._rows) + 1)
        row, place = begin[:-1], self._known + number
        valid = self._alive & (drafts >= 0)
        plans = self._plans(begin.astype(np.int32), place + 1, row, place, valid, 1, self._ahead(number + 1))
        forward = Forward(tensor(np.maximum(drafts, 0)), tensor(place), self.parts.kv.kv, plans)
        rows = tensor(row)
        return DraftBatch(forward, rows, rows, rows.new_zeros(0))

    def _plans(
        self,
        begin: np.ndarray,
        kv_len: np.ndarray,
        row: np.ndarray,
        place: np.ndarray,
        valid: np.ndarray,
        max_q: int,
        max_kv: int,
    ) -> Mapping[str, object]:
        tables, kv = self.parts.tables, self.parts.kv
        size, valid = tables.block_size, valid & (place < self.slots.max_len)
        bounds: Sequence[Tensor] = tensor(begin), tensor(kv_len.astype(np.int32))
        batches: list[AttentionBatch | None] = [None] * len(kv.groups)
        for number in self.parts.groups:
            table = np.ascontiguousarray(tables.tables[number].numpy()[self._rows, : tables.columns(max_kv)])
            slots = cache_slots(table, row, place, size)
            slots[~valid | (slots < size)] = -1
            batches[number] = AttentionBatch(*bounds, tensor(table), tensor(slots), size, max_q, max_kv)
        return kv.plans(batches, self.parts.layers)
