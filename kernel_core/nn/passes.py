"""Passes of a drafter's own layers: what they compute, where their KV goes, and what they may see.

A step computed `q` tokens of a row from position `computed` on; after verification the row knows `known` tokens. The layers
of a drafter first catch up with that, then run ahead of it over their own drafts, in blocks that the plan allocated beyond
its positions. What they store ahead is overwritten when the true tokens are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np
import torch
from torch import Tensor

from kernel_core.nn.draws import draw
from kernel_core.nn.inputs import Step, draft_paths, within_window
from kernel_core.nn.kv import KVStore
from kernel_core.nn.protocols import AttentionBatch, DraftBatch, DraftView, Forward
from kernel_core.nn.slots import BlockTables, SlotTable
from kernel_core.nn.transfer import upload, upload_columns
from kernel_core.nn.verify import Verified


class Drafting:
    """The runner part "drafting": what a drafter sees of a step, and where its drafts go. `layers`: the drafter's own in the KV
    groups. Replaceable: anything with the same methods."""

    def __init__(self, slots: SlotTable, tables: BlockTables, kv: KVStore, tree: bool, layers: Set[str], vocab_size: int) -> None:
        self.slots, self.tables, self.kv, self.tree = slots, tables, kv, tree
        self.layers, self.vocab_size = layers, vocab_size
        self.groups = [index for index, group in enumerate(kv.groups) if layers & set(group.layers)]

    def view(self, step: Step, verified: Verified, hidden: Tensor, taps: Mapping[str, Tensor]) -> DraftView:
        """Called after the slots took the step's tokens. Rate: step, unless the drafter sleeps."""
        rows, accepted = step.view.rows, verified.accepted
        known = self.slots.known[rows]
        path = states_of_path(step, verified)
        most = torch.clamp(self.slots.max_drafts[rows], max=self.slots.draft_width)
        return DraftView(
            step.view,
            accepted.int(),
            last_token=self.slots.tokens[rows, known.long() - 1].long(),
            hidden=hidden,
            taps=taps,
            wanted=(torch.minimum((self.slots.max_len - known - 1).clamp(min=0), most) * (step.room > 0)).int(),
            known=known,
            path=path,
            passes=Passes(self, step, accepted, path),
            **self.on_host(step),
        )

    def on_host(self, step: Step) -> dict[str, np.ndarray]:
        """The fields of a `DraftView` that the host has."""
        slots, sampled = np.asarray(step.plan.rows, np.int64), np.asarray(step.plan.room) > 0
        most = np.where(sampled, self.slots.host["max_drafts"][slots], 0)
        return {"host_slots": slots, "host_sampled": sampled, "host_most": most}

    def keep(self, view: DraftView, tokens: Tensor, parents: Tensor, count: Tensor) -> Tensor:
        """Enter what the drafter proposed into the slots → drafts waiting [R]. Rate: as `view`."""
        rows, width = view.step.rows, self.slots.draft_width
        number = torch.arange(width, device=self.slots.device)
        live = (number < count[:, None]) & (number < view.wanted[:, None]) & (tokens >= 0) & (tokens < self.vocab_size)
        self.slots.drafts[rows] = torch.where(live, tokens, -1)
        self.slots.parents[rows] = parents.int() if self.tree else self.slots.chain
        return torch.where(live, number + 1, 0).amax(-1) if width else live.sum(-1)


def states_of_path(step: Step, verified: Verified) -> Tensor:
    """[R, 1 + m]: where in the step's tokens each row's last known token and its accepted drafts are, in order."""
    settled = torch.where(step.room > 0, step.known - step.computed, step.view.lens - step.computed)
    base = step.view.q_start[:-1].long() + settled - 1
    order = torch.cat([torch.zeros_like(base)[:, None], verified.path + 1], 1)
    number = torch.arange(order.shape[1], device=order.device)
    return base[:, None] + order.gather(1, torch.minimum(number, verified.accepted[:, None]))


class Passes:
    """Implements `DraftPasses` for one step."""

    def __init__(self, parts: Drafting, step: Step, accepted: Tensor, path: Tensor) -> None:
        self.parts, self.slots, self.step, self.path = parts, parts.slots, step, path
        self.rows = step.view.rows
        own = step.view.lens.long() - step.computed  # q
        self.settled = torch.where(step.room > 0, step.known - step.computed, own)  # known tokens that the step computed
        self.counted = self.settled + torch.where(step.room > 0, accepted, 0)
        self.known = step.computed.long() + self.counted + 1  # in the middle of a prompt only as far as it was computed
        self.sampled = step.room > 0

    def catch_up(self, shift: int) -> DraftBatch:
        layout, device = self.step.layout, self.slots.device
        start, q = layout.q_start, np.diff(layout.q_start)
        begin = start if shift else start + np.arange(len(start))
        lengths = q if shift else q + 1
        row_host = np.repeat(np.arange(len(q)), lengths)
        index_host = np.arange(begin[-1]) - begin[row_host]
        on = upload_columns({"begin": begin, "row": row_host, "index": index_host, "start": start[:-1]}, device)
        row, index = on["row"], on["index"]
        place = self.step.computed[row].long() + index + shift
        token_ids = self.slots.tokens[self.rows[row], place.clamp(max=self.slots.max_len)].long()
        valid = index < self.counted[row] + 1 - shift
        valid &= place >= self.step.write_from[row]
        source = self._source(on["start"], row, index + shift - 1)
        last = on["begin"][:-1] + self.counted - shift
        kv_len = (self.step.view.lens + 1).int()
        plans = self._attention(on["begin"].int(), kv_len, row, place, valid, int(lengths.max()), layout.max_kv + 1)
        return DraftBatch(Forward(token_ids, place, self.parts.kv.kv, plans), row, last, source)

    def _source(self, start: Tensor, row: Tensor, index: Tensor) -> Tensor:
        """Where in the step's tokens the state of a row's counted token `index` is: drafts lie where their path went."""
        beyond = (index - self.settled[row] + 1).clamp(0, self.path.shape[1] - 1)
        straight = start[row] + index.clamp(min=0)
        return torch.where(index < self.settled[row], straight, self.path[row, beyond])

    def advance(self, tokens: Tensor, number: int) -> DraftBatch:
        count, device = len(self.rows), self.slots.device
        row = torch.arange(count, device=device)
        place = self.known + number
        begin = torch.arange(count + 1, dtype=torch.int32, device=device)
        valid = self.sampled & (tokens >= 0)
        max_kv = self._ahead(number + 1)
        plans = self._attention(begin, (place + 1).int(), row, place, valid, 1, max_kv)
        forward = Forward(tokens.clamp(min=0), place, self.parts.kv.kv, plans)
        return DraftBatch(forward, row, row, row.new_zeros(0))

    def expand(self, tokens: Tensor, parents: Tensor) -> DraftBatch:
        (count, nodes), device = tokens.shape, self.slots.device
        row = torch.arange(count, device=device).repeat_interleave(nodes)
        index = torch.arange(nodes, device=device).repeat(count)
        path = draft_paths(parents)
        positions = (self.known[:, None] + path.sum(-1) - 1).flatten()
        place = self.known[row] + index
        begin = torch.arange(count + 1, dtype=torch.int32, device=device) * nodes
        valid = (self.sampled[:, None] & (tokens >= 0)).flatten()
        sees = path.flatten(0, 1)
        lens = (self.known + nodes).int()
        max_kv = self._ahead(nodes)
        plans = self._attention(begin, lens, row, place, valid, nodes, max_kv, sees, positions)
        forward = Forward(tokens.flatten().clamp(min=0), positions, self.parts.kv.kv, plans)
        return DraftBatch(forward, row, begin[1:].long() - 1, row.new_zeros(0))

    def _ahead(self, tokens: int) -> int:
        """Host bound of the KV length when that many tokens follow the known ones."""
        return self.step.layout.max_kv + 1 + tokens

    def _attention(
        self,
        begin: Tensor,
        kv_len: Tensor,
        row: Tensor,
        place: Tensor,
        valid: Tensor,
        max_q: int,
        max_kv: int,
        sees: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> dict[str, object]:
        """The plans of the drafter's layers. What is not valid, beyond the maximal length or without a block is not written."""
        tables, kv = self.parts.tables, self.parts.kv
        valid = valid & (place < self.slots.max_len)
        batches: list[AttentionBatch | None] = [None] * len(kv.groups)
        for number in self.parts.groups:
            group = kv.groups[number]
            table = tables.rows(number, self.rows, max_kv)
            slots = tables.kv_slots(table, row, place)
            slots = slots.masked_fill_(~valid | (slots < group.block_size), -1)
            near = sees
            if sees is not None and group.window is not None:
                near = within_window(sees, positions, begin.long(), row, group.window)
            batches[number] = AttentionBatch(
                begin, kv_len, table, slots, group.block_size, max_q, max_kv, near, None if sees is None else positions
            )
        return kv.plans(batches, self.parts.layers)

    def draw(self, logits: Tensor, number: int | Tensor) -> Tensor:
        temperature = self.slots.host["temperature"][self.step.plan.rows]
        tokens = logits.argmax(-1)
        random = np.flatnonzero(temperature > 0)
        if len(random):
            index = upload(random, self.slots.device)
            slot = self.rows[index]
            ahead = number[index] if isinstance(number, Tensor) else number
            scaled = logits[index].float() / self.slots.temperature[slot][:, None]
            tokens[index] = draw(scaled, self.slots.key[slot], self.known[index] + ahead)
        return tokens
