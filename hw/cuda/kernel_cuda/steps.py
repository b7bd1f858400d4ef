"""The runner parts around a forward, a launch or two each. Branching drafts are left to the kernel's own parts, which say what
every array means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import triton
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
    Step,
    StepInputBuilder,
    StepView,
    Verified,
    layout,
    upload,
    upload_columns,
)
from kernel_cuda.kernels import drafts as kernels
from kernel_cuda.kernels import sampling
from kernel_cuda.sampling import draws_of

BLOCK = 128  # tokens, or columns of a block table, that a program looks at


def _wide(*shape: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device=device)


def _narrow(*shape: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=device)


def _flags(*shape: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=device)


@dataclass(slots=True)
class FusedStep(Step):
    """`first` [R + 1]: where a row's logits rows begin."""

    first: Tensor


@dataclass(slots=True)
class FusedVerified(Verified):
    """`report` int32 [R, 1 + m], the tokens, and `numbers` int32 [5, R] are for the host."""

    report: Tensor
    numbers: Tensor


class FusedInputs(StepInputBuilder):
    """The part "step_inputs"."""

    def build(self, plan: StepPlan) -> Step:
        shape = layout(plan)
        if self.tree and shape.width:
            return super().build(plan)
        first = np.concatenate([[0], np.cumsum(plan.room, dtype=np.int64)])
        columns = {"rows": plan.rows, "q_start": shape.q_start, "room": plan.room, "write_from": plan.write_from, "first": first}
        slots, q_start, room, write_from, first = upload_columns(columns, self.slots.device).values()
        view, step = self._rows(plan, shape, slots, q_start, room, first)
        batches = []
        for number, group in enumerate(self.groups):
            kv_slots, table = self._tokens_of(number, slots, q_start, room, write_from, view, shape)
            where = table, kv_slots, group.block_size, shape.max_q, shape.max_kv
            batches.append(AttentionBatch(view.q_start, view.lens, *where, None, None, shape.fresh))
        known, computed, parents, logits_token = step
        path = self.chain_paths(len(slots), shape.width)
        return FusedStep(plan, shape, view, batches, known, computed, room, write_from, parents, path, logits_token, first)

    def _rows(
        self, plan: StepPlan, shape: Layout, slots: Tensor, q_start: Tensor, room: Tensor, first: Tensor
    ) -> tuple[StepView, tuple[Tensor, ...]]:
        state, on, rows, width, logits = self.slots, slots.device, len(plan.rows), shape.width, len(shape.logits_row)
        known, computed, lens = (_narrow(rows, device=on) for _ in range(3))
        starts, parents = _narrow(rows + 1, device=on), _narrow(rows, width, device=on)
        next_token, drafts = _wide(rows, device=on), _wide(rows, width, device=on)
        row, slot, position, logits_token = (_wide(logits, device=on) for _ in range(4))
        draft_pos, before = _narrow(logits, device=on), _narrow(logits, width, device=on)
        kernels.rows[(rows,)](
            slots, q_start, room, first, state.tokens, state.known, state.computed, state.drafts, state.parents,
            known, computed, lens, next_token, starts, drafts, parents, row, slot, draft_pos, position, before, logits_token,
            rows, width, state.tokens.stride(0), state.drafts.stride(0), W=triton.next_power_of_2(1 + width), num_warps=1,
        )  # fmt: skip
        total = int(shape.q_start[-1])
        view = StepView(
            rows=slots,
            lens=lens,
            next_token=next_token,
            token_ids=_wide(total, device=on),
            positions=_wide(1, total, device=on),
            q_start=starts,
            slot=slot,
            row=row,
            draft_pos=draft_pos,
            position=position,
            ancestors=before,
            drafts=drafts,
            **self.of_slots(shape),
        )
        return view, (known, computed, parents, logits_token)

    def _tokens_of(
        self, group: int, slots: Tensor, q_start: Tensor, room: Tensor, write_from: Tensor, view: StepView, shape: Layout
    ) -> tuple[Tensor, Tensor]:
        """KV slots of the tokens and the rows' tables in a group; with the first one, ids and positions."""
        state, table, size = self.slots, self.tables.tables[group], self.tables.block_size
        columns = self.tables.columns(shape.max_kv)
        kv_slots = _wide(int(shape.q_start[-1]), device=slots.device)
        gathered = _narrow(len(slots), columns, device=slots.device)
        kernels.tokens_of_rows[(len(slots), triton.cdiv(max(shape.max_q, columns), BLOCK))](
            slots, q_start, room, write_from, state.tokens, state.known, state.computed, state.drafts, table,
            view.token_ids, view.positions, kv_slots, gathered,
            state.tokens.stride(0), state.drafts.stride(0), table.stride(0), columns, size, state.max_len,
            IDS=group == 0, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
        return kv_slots, gathered


class FusedAcceptance(Acceptance):
    """The part "acceptance"."""

    def __call__(self, step: Step, sampled: Sampled | None) -> Verified:
        if not isinstance(step, FusedStep):
            return super().__call__(step, sampled)
        state, view, rows, width, on = self.slots, step.view, len(step.plan.rows), step.layout.width, self.slots.device
        tokens, path = _wide(rows, 1 + width, device=on), _wide(rows, width, device=on)
        count, accepted, bad = _wide(rows, device=on), _wide(rows, device=on), _flags(rows, device=on)
        report, numbers = _narrow(rows, 1 + width, device=on), _narrow(5, rows, device=on)
        draws, unusable = (sampled.draws, sampled.bad.view(torch.int8)) if sampled else (view.rows, bad.view(torch.int8))
        kernels.accept[(rows,)](
            view.rows, step.room, step.first, draws, unusable, view.drafts, step.known, view.lens,
            state.tokens, state.known, state.computed,
            tokens, count, accepted, path, bad.view(torch.int8), report, numbers,
            rows, width, state.tokens.stride(0), state.max_len, W=triton.next_power_of_2(1 + width), num_warps=1,
        )  # fmt: skip
        return FusedVerified(tokens, count, accepted, path, bad, report, numbers)

    def report(self, step: Step, verified: Verified, waiting: Tensor | None) -> dict[str, Tensor]:
        if not isinstance(verified, FusedVerified):
            return super().report(step, verified, waiting)
        if waiting is not None:
            verified.numbers[4].copy_(waiting)
        return {"tokens": verified.report, "numbers": verified.numbers, "bad": verified.bad}


class FusedDrafting(Drafting):
    """The part "drafting"."""

    def view(self, step: Step, verified: Verified, hidden: Tensor, taps: Mapping[str, Tensor]) -> DraftView:
        if self.tree:
            return super().view(step, verified, hidden, taps)
        state, rows, width, on = self.slots, len(step.plan.rows), step.layout.width, self.slots.device
        accepted, wanted, known = (_narrow(rows, device=on) for _ in range(3))
        last_token, settled, counted, known_wide = (_wide(rows, device=on) for _ in range(4))
        path, sampled = _wide(rows, 1 + width, device=on), _flags(rows, device=on)
        kernels.view[(rows,)](
            step.view.rows, step.view.q_start, step.room, step.known, step.computed, step.view.lens, verified.accepted,
            state.tokens, state.known, state.max_drafts,
            accepted, last_token, wanted, known, path, settled, counted, known_wide, sampled.view(torch.int8),
            width, state.draft_width, state.tokens.stride(0), state.max_len, W=triton.next_power_of_2(1 + width), num_warps=1,
        )  # fmt: skip
        return DraftView(
            step.view,
            accepted,
            last_token=last_token,
            hidden=hidden,
            taps=taps,
            wanted=wanted,
            known=known,
            path=path,
            passes=FusedPasses(self, step, path, settled, counted, known_wide, sampled),
            **self.on_host(step),
        )

    def keep(self, view: DraftView, tokens: Tensor, parents: Tensor, count: Tensor) -> Tensor:
        if self.tree:
            return super().keep(view, tokens, parents, count)
        state, waiting = self.slots, _wide(len(tokens), device=tokens.device)
        kernels.keep[(len(tokens),)](
            view.step.rows, tokens, count, view.wanted, state.drafts, state.parents, waiting, self.vocab_size, state.draft_width,
            tokens.stride(0), tokens.stride(1), state.drafts.stride(0), W=triton.next_power_of_2(state.draft_width), num_warps=1,
        )  # fmt: skip
        return waiting


class FusedPasses(Passes):
    """`DraftPasses` of a step whose drafts were a chain."""

    def __init__(
        self, parts: Drafting, step: Step, path: Tensor, settled: Tensor, counted: Tensor, known: Tensor, sampled: Tensor
    ) -> None:
        self.parts, self.slots, self.step, self.rows, self.path = parts, parts.slots, step, step.view.rows, path
        self.settled, self.counted, self.known, self.sampled = settled, counted, known, sampled
        self._ramp = torch.arange(len(self.rows) + 1, device=self.rows.device)
        self._starts = self._ramp.int()

    def catch_up(self, shift: int) -> DraftBatch:
        state, step, rows, on = self.slots, self.step, len(self.rows), self.slots.device
        start, q = step.layout.q_start, np.diff(step.layout.q_start)
        ends = start if shift else start + np.arange(rows + 1)
        begin, total, longest = upload(ends, on), int(ends[-1]), int(q.max()) + (not shift)
        ids, positions, row, source = (_wide(total, device=on) for _ in range(4))
        last, starts, lens = _wide(rows, device=on), _narrow(rows + 1, device=on), _narrow(rows, device=on)
        batches: list[AttentionBatch | None] = [None] * len(self.parts.kv.groups)
        max_kv, tables = step.layout.max_kv + 1, self.parts.tables
        size, columns = tables.block_size, tables.columns(max_kv)
        for group in self.parts.groups:
            table = tables.tables[group]
            kv_slots, gathered = _wide(total, device=on), _narrow(rows, columns, device=on)
            kernels.catch_up[(rows, triton.cdiv(max(longest, columns), BLOCK))](
                self.rows, step.view.q_start, begin, step.write_from, step.computed, step.view.lens, self.settled, self.counted,
                self.path, state.tokens, table, ids, positions, row, source, kv_slots, gathered, last, starts, lens,
                rows, step.layout.width, shift, state.tokens.stride(0), table.stride(0), columns, size, state.max_len,
                IDS=group == self.parts.groups[0], BLOCK=BLOCK, num_warps=1,
            )  # fmt: skip
            batches[group] = AttentionBatch(starts, lens, gathered, kv_slots, size, longest, max_kv)
        plans = self.parts.kv.plans(batches, self.parts.layers)
        return DraftBatch(Forward(ids, positions, self.parts.kv.kv, plans), row, last, source)

    def advance(self, tokens: Tensor, number: int) -> DraftBatch:
        rows, on, max_kv = len(self.rows), self.slots.device, self._ahead(number + 1)
        ids, positions, lens = _wide(rows, device=on), _wide(rows, device=on), _narrow(rows, device=on)
        batches: list[AttentionBatch | None] = [None] * len(self.parts.kv.groups)
        tables = self.parts.tables
        size, columns = tables.block_size, tables.columns(max_kv)
        for group in self.parts.groups:
            table = tables.tables[group]
            kv_slots, gathered = _wide(rows, device=on), _narrow(rows, columns, device=on)
            kernels.advance[(rows, triton.cdiv(columns, BLOCK))](
                self.rows, self.known, self.sampled.view(torch.int8), tokens, table, ids, positions, kv_slots, gathered, lens,
                number, tokens.stride(0), table.stride(0), columns, size, self.slots.max_len, BLOCK=BLOCK, num_warps=1,
            )  # fmt: skip
            batches[group] = AttentionBatch(self._starts, lens, gathered, kv_slots, size, 1, max_kv)
        forward = Forward(ids, positions, self.parts.kv.kv, self.parts.kv.plans(batches, self.parts.layers))
        row = self._ramp[:-1]
        return DraftBatch(forward, row, row, row.new_zeros(0))

    def draw(self, logits: Tensor, number: int | Tensor) -> Tensor:
        state = self.slots
        if draws_of(state, self.step.plan.rows) == "greedy":
            return sampling.argmax(logits)[0]
        numbers = state.temperature, state.min_p, state.top_k, state.top_p, state.key
        return sampling.sample(logits, self.rows, self.known + number, *numbers, filters=False)[0]
