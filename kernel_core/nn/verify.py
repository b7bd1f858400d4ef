"""Verification of drafts: draw every drafted position as plain sampling would, accept while draft equals draw.

A draft can so change how many tokens a step gains, never which. Chains and trees are the same walk from the last known
token: in a tree it goes on to the child that equals the draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernel_core.nn.inputs import Step
from kernel_core.nn.kv import KVStore
from kernel_core.nn.sampler import Sampled
from kernel_core.nn.slots import BlockTables, SlotTable


@dataclass(slots=True)
class Verified:
    """Per row: `tokens` [R, 1 + m] int64 gained (the first `count` count), `count` [R] (accepted + 1, 0 for rows that are
    not sampled), `accepted` [R], `path` [R, m] the accepted drafts in order (-1 padded), `bad` [R] an accepted place had
    no usable logits."""

    tokens: Tensor
    count: Tensor
    accepted: Tensor
    path: Tensor
    bad: Tensor


def verify(drafts: Tensor, parents: Tensor, draws: Tensor, bad: Tensor, sampled: Tensor) -> Verified:
    """drafts [R, m] (-1 absent), parents [R, m], draws [R, 1 + m] (what was drawn after the last known token and after
    each draft), bad [R, 1 + m] bool, sampled [R] bool → what the rows gain. No host reads; m iterations."""
    rows, width = drafts.shape
    place = torch.zeros(rows, 1, dtype=torch.int64, device=drafts.device)  # column of `draws` where the walk is
    alive = sampled[:, None]
    token, broken = draws[:, :1], bad[:, :1]
    tokens, path = [token], []
    for _ in range(width):
        child = (parents == place - 1) & (drafts == token) & (drafts >= 0) & alive
        alive = child.any(-1, keepdim=True)
        draft = child.int().argmax(-1, keepdim=True)
        place = torch.where(alive, draft + 1, place)
        token = draws.gather(1, place)
        broken = broken | (bad.gather(1, place) & alive)
        tokens.append(token)
        path.append(torch.where(alive, draft, -1))
    steps = torch.cat(path, 1) if path else drafts
    accepted = (steps >= 0).sum(-1)
    count = torch.where(sampled, accepted + 1, 0)
    return Verified(torch.cat(tokens, 1), count, accepted, steps, broken[:, 0] & sampled)


def compaction(path: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """Where the KV of the accepted path lies and where it belongs: (from, to) positions [R, m]; equal where nothing moves.
    path [R, m] draft numbers in order (-1 padded), known [R] tokens before the step."""
    order = torch.arange(path.shape[1], device=path.device)
    to = known[:, None].long() + order
    return torch.where(path >= 0, known[:, None].long() + path, to), to


class Acceptance:
    """The runner part "acceptance": what was drawn becomes what the rows gained. Replaceable: anything with the same methods."""

    def __init__(self, slots: SlotTable, tables: BlockTables, kv: KVStore, tree: bool) -> None:
        self.slots, self.tables, self.kv, self.tree = slots, tables, kv, tree

    def __call__(self, step: Step, sampled: Sampled | None) -> Verified:
        """Walk the drafts, enter the new tokens and counts into the slots, compact the KV of accepted tree paths. Rate: step."""
        draws, bad = self._by_row(step, sampled)
        verified = verify(step.view.drafts, step.parents, draws, bad, step.room > 0)
        if self.tree and step.layout.width:
            self._compact(step, verified)
        self._advance(step, verified)
        return verified

    def report(self, step: Step, verified: Verified, waiting: Tensor | None) -> dict[str, Tensor]:
        """What the result is made of; a broken row reports no tokens. `waiting` [R]: drafts for the next step. Rate: step."""
        count = verified.count.masked_fill(verified.bad, 0)
        drafted = (step.view.drafts >= 0).sum(-1)
        waiting = torch.zeros_like(count) if waiting is None else waiting
        accepted = verified.accepted.masked_fill(verified.bad, 0)
        numbers = torch.stack([count, accepted, drafted, self.slots.computed[step.view.rows], waiting]).int()
        return {"tokens": verified.tokens.int(), "numbers": numbers, "bad": verified.bad}

    def _by_row(self, step: Step, sampled: Sampled | None) -> tuple[Tensor, Tensor]:
        """Draws and whether they are bad as [R, 1 + m], by the place that decided them."""
        rows, width = len(step.plan.rows), step.layout.width
        if sampled is not None and not width and len(step.layout.logits_row) == rows:
            return sampled.draws[:, None], sampled.bad[:, None]
        draws = torch.full((rows, 1 + width), -1, dtype=torch.int64, device=self.slots.device)
        bad = torch.zeros(rows, 1 + width, dtype=torch.bool, device=self.slots.device)
        if sampled is not None:
            place = (step.view.row, step.view.draft_pos.long())
            draws[place], bad[place] = sampled.draws, sampled.bad
        return draws, bad

    def _compact(self, step: Step, verified: Verified) -> None:
        src, dst = compaction(verified.path, step.known)
        row = torch.arange(len(src), device=self.slots.device).repeat_interleave(src.shape[1])
        moved = (src != dst).flatten()
        for number, batch in enumerate(step.attention):
            slots = [self.tables.kv_slots(batch.block_table, row, p.flatten()) for p in (src, dst)]
            self.kv.copy(number, *(torch.where(moved, s, 0) for s in slots))

    def _advance(self, step: Step, verified: Verified) -> None:
        rows, count = step.view.rows, verified.count
        order = torch.arange(verified.tokens.shape[1], device=self.slots.device)
        place = torch.where(order < count[:, None], step.known[:, None] + order, self.slots.max_len)
        place = place.clamp_(max=self.slots.max_len)
        self.slots.tokens[rows[:, None], place.long()] = verified.tokens.int()
        q = torch.where(step.room > 0, step.known - step.computed + verified.accepted, step.view.lens - step.computed)
        self.slots.computed[rows] = (step.computed + q).int()
        self.slots.known[rows] = (step.known + count).int()
