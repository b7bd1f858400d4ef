"""From a plan and the slots' true state to the tensors of one step.

What has the plan's shape (which row, which of its tokens, which logits rows) is numpy on the host; what depends on true
counts or on tokens is gathered on the device, so that nothing here makes the host wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_core.nn.protocols import AttentionBatch, StepView
from kernel_core.nn.slots import BlockTables, SlotTable
from kernel_core.nn.transfer import upload, upload_columns
from kernel_core.plan import KVGroup, StepPlan


@dataclass(frozen=True, slots=True)
class Layout:
    """The shape of a step, on the host. T tokens: `row`, `index` (within the row), `draft` (its draft number, negative for
    known tokens). N logits rows: `logits_row`, `logits_slot`, `logits_draft` (0: after the last known token, j: after
    draft j), `logits_token` (index into the T tokens). `width`: most drafts a row; `fresh`: no row has KV from earlier steps."""

    q_start: np.ndarray
    row: np.ndarray
    index: np.ndarray
    draft: np.ndarray
    logits_row: np.ndarray
    logits_slot: np.ndarray
    logits_draft: np.ndarray
    logits_token: np.ndarray
    width: int
    max_q: int
    max_kv: int
    fresh: bool


def layout(plan: StepPlan) -> Layout:
    """Lay out a plan of at least one row."""
    rows, q, room = (np.asarray(a, np.int64) for a in (plan.rows, plan.q, plan.room))
    q_start = np.concatenate([[0], np.cumsum(q)])
    row = np.repeat(np.arange(len(q)), q)
    index = np.arange(q_start[-1]) - q_start[row]
    known = q - np.maximum(room - 1, 0)  # per row, its tokens that are not drafts
    logits_row = np.repeat(np.arange(len(q)), room)
    logits_draft = np.arange(len(logits_row)) - np.repeat(np.cumsum(room) - room, room)
    return Layout(
        q_start=q_start,
        row=row,
        index=index,
        draft=index - known[row],
        logits_row=logits_row,
        logits_slot=rows[logits_row],
        logits_draft=logits_draft,
        logits_token=q_start[logits_row] + known[logits_row] - 1 + logits_draft,
        width=max(int(room.max()) - 1, 0),
        max_q=int(q.max()),
        max_kv=int((np.asarray(plan.start) + q).max()),
        fresh=not (room > 1).any() and not np.any(plan.start),
    )


@dataclass(slots=True)
class Step:
    """One step on the device: the view plugins see, the groups' attention inputs, and what verification needs.

    `known`, `computed` [R] are the counts before the step, `write_from` [R] the plan's; `parents` [R, m]; `path` [R, m, m]
    bool: draft a is draft d or before it on its path; `logits_token` [N]."""

    plan: StepPlan
    layout: Layout
    view: StepView
    attention: list[AttentionBatch]
    known: Tensor
    computed: Tensor
    room: Tensor
    write_from: Tensor
    parents: Tensor
    path: Tensor
    logits_token: Tensor


def draft_paths(parents: Tensor) -> Tensor:
    """parents [R, m] → [R, m, m] bool: entry (d, a) says that draft a is d itself or one that d continues."""
    rows, width = parents.shape
    path = torch.eye(width, dtype=torch.bool, device=parents.device).repeat(rows, 1, 1)
    for d in range(1, width):
        parent = parents[:, d].long()
        inherited = path.gather(1, parent.clamp(min=0)[:, None, None].expand(-1, 1, width)).squeeze(1)
        path[:, d] |= inherited & (parent >= 0)[:, None]
    return path


def ancestors(path: Tensor) -> Tensor:
    """Paths [R, m, m] → [R, 1 + m, m] int32: for every place that decides a token, the drafts before it in path order,
    padded with -1. A parent's number is smaller than its child's, so path order is ascending order."""
    rows, width, _ = path.shape
    out = torch.full((rows, 1 + width, width + 1), -1, dtype=torch.int32, device=path.device)
    place = torch.where(path, path.cumsum(-1) - 1, width)
    drafts = torch.arange(width, dtype=torch.int32, device=path.device).expand(rows, width, -1)
    out[:, 1:].scatter_(2, place, drafts)
    return out[..., :width]


class StepInputBuilder:
    """The runner part "step_inputs". `tree`: drafts may branch. Replaceable: anything with the same `build`."""

    def __init__(self, slots: SlotTable, tables: BlockTables, groups: tuple[KVGroup, ...], tree: bool) -> None:
        self.slots, self.tables, self.groups, self.tree = slots, tables, groups, tree
        self._chain = torch.ones(slots.draft_width, slots.draft_width, dtype=torch.bool, device=slots.device).tril()

    def chain_paths(self, rows: int, width: int) -> Tensor:
        """`draft_paths` of chains."""
        return self._chain[:width, :width].expand(rows, -1, -1)

    def of_slots(self, shape: Layout) -> dict[str, Any]:
        """The fields of a `StepView` that no step has to make."""
        state = self.slots
        held = {"history": state.tokens, "known": state.known, "num_prompt": state.num_prompt}
        return held | {"host_slot": shape.logits_slot, "max_len": min(shape.max_kv, state.max_len)}

    def build(self, plan: StepPlan) -> Step:
        """Make the step's tensors from the slots as the steps before leave them. Rate: step."""
        shape = layout(plan)
        on = self._upload(plan, shape)
        rows, state = on["rows"], self.slots
        known, computed = state.known[rows], state.computed[rows]
        width = np.arange(shape.width)
        drafts = state.drafts[rows, : shape.width]
        if shape.width:
            within = upload(width, state.device)[None, :] < on["room"][:, None] - 1
            drafts = torch.where(within, drafts, -1)
        parents = state.parents[rows, : shape.width]
        path = draft_paths(parents) if self.tree else self.chain_paths(len(rows), shape.width)
        token_ids, positions, absent = self._tokens(on, shape, known, computed, drafts, path)
        view = self._view(on, shape, known, computed, token_ids, positions, drafts, path)
        batches = self._attention(plan, on, shape, view, computed, absent, path)
        counts = (known, computed, on["room"], on["write_from"])
        return Step(plan, shape, view, batches, *counts, parents, path, on["logits_token"])

    def _upload(self, plan: StepPlan, shape: Layout) -> dict[str, Tensor]:
        names = ("q_start", "row", "index", "draft", "logits_row", "logits_slot", "logits_draft", "logits_token")
        columns = {name: getattr(shape, name) for name in names}
        columns |= {"rows": plan.rows, "q": plan.q, "room": plan.room, "write_from": plan.write_from}
        return upload_columns(columns, self.slots.device)

    def _tokens(
        self, on: dict[str, Tensor], shape: Layout, known: Tensor, computed: Tensor, drafts: Tensor, path: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """→ token ids [T], logical positions [T], and which tokens are absent drafts (None: no drafts)."""
        row = on["row"]
        place = computed[row].long() + on["index"]
        token_ids = self.slots.tokens[on["rows"][row], place.clamp(max=self.slots.max_len)].long()
        if not shape.width:
            return token_ids, place, None
        number = on["draft"].clamp(min=0)
        is_draft = on["draft"] >= 0
        draft = drafts[row, number]
        depth = path.sum(-1)[row, number] - 1
        positions = torch.where(is_draft, known[row].long() + depth, place)
        absent = is_draft & (draft < 0)
        return torch.where(is_draft, draft.clamp(min=0), token_ids), positions, absent

    def _view(
        self,
        on: dict[str, Tensor],
        shape: Layout,
        known: Tensor,
        computed: Tensor,
        token_ids: Tensor,
        positions: Tensor,
        drafts: Tensor,
        path: Tensor,
    ) -> StepView:
        state, rows, row, after = self.slots, on["rows"], on["logits_row"], on["logits_draft"]
        before = ancestors(path)[row, after] if shape.width else known.new_zeros(len(row), 0)
        return StepView(
            rows=rows,
            lens=(computed + on["q"]).int(),
            next_token=state.tokens[rows, known.long() - 1].long(),
            token_ids=token_ids,
            positions=positions[None],
            q_start=on["q_start"].int(),
            slot=on["logits_slot"],
            row=row,
            draft_pos=after.int(),
            position=known[row].long() + (before >= 0).sum(-1) if shape.width else known[row].long(),
            ancestors=before,
            drafts=drafts,
            **self.of_slots(shape),
        )

    def _attention(
        self,
        plan: StepPlan,
        on: dict[str, Tensor],
        shape: Layout,
        view: StepView,
        computed: Tensor,
        absent: Tensor | None,
        path: Tensor,
    ) -> list[AttentionBatch]:
        row = on["row"]
        place = computed[row].long() + on["index"]
        masked = place < on["write_from"][row]
        masked = masked if absent is None else masked | absent
        branching = bool(self.tree and shape.width)
        sees = self._tree_mask(on, shape, path) if branching else None
        batches = []
        for number, group in enumerate(self.groups):
            table = self.tables.rows(number, view.rows, shape.max_kv)
            kv_slots = self.tables.kv_slots(table, row, place).masked_fill_(masked, -1)
            batches.append(
                AttentionBatch(
                    view.q_start,
                    view.lens,
                    table,
                    kv_slots,
                    group.block_size,
                    shape.max_q,
                    shape.max_kv,
                    _near(sees, view, on, group.window),
                    view.positions[0] if branching else None,
                    shape.fresh,
                )
            )
        return batches

    def _tree_mask(self, on: dict[str, Tensor], shape: Layout, path: Tensor) -> Tensor:
        """[T, W] bool: known tokens are causal, a draft sees all known tokens and its own path."""
        row, index, number = on["row"], on["index"], on["draft"]
        other = torch.arange(shape.max_q, device=row.device)[None, :]
        other_number = other - (index - number)[:, None]  # draft number of the row's token `other`
        on_path = path[row[:, None], number.clamp(min=0)[:, None], other_number.clamp(min=0, max=shape.width - 1)]
        is_draft = (number >= 0)[:, None]
        return (other <= index[:, None]) & (~is_draft | (other_number < 0) | on_path)


def _near(sees: Tensor | None, view: StepView, on: dict[str, Tensor], window: int | None) -> Tensor | None:
    if sees is None or window is None:
        return sees
    return within_window(sees, view.positions[0], on["q_start"], on["row"], window)


def within_window(sees: Tensor, position: Tensor, q_start: Tensor, row: Tensor, window: int) -> Tensor:
    """A tree mask [T, W] narrowed to a window, which is counted in logical positions [T]: where drafts branch these differ
    from places. q_start [R + 1], row [T] int64."""
    other = torch.arange(sees.shape[1], device=sees.device)[None, :]
    token = (q_start[row][:, None] + other).clamp_(max=len(position) - 1)
    return sees & (position[:, None] - position[token] < window)
