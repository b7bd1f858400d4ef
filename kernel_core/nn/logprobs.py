"""Logprobs of sampled and of prompt tokens, in columns: chosen token first, then the best alternatives, and the rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernel_core.nn.inputs import Layout
from kernel_core.nn.slots import SlotTable
from kernel_core.nn.transfer import upload_columns
from kernel_core.plan import NO_TOKEN, PROMPT_LOGPROBS, Logprobs, StepPlan

Rank = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]  # as `Sampler.rank`
ELEMENTS_AT_ONCE = 1 << 24  # logits that prompt logprobs may hold at a time


@dataclass(frozen=True, slots=True)
class LogprobColumns:
    """Entry i belongs to row `row[i]`. `k[i]`: alternatives it asked for. `where[i]`: which logits row, or which
    position of the request. Host arrays but `token_ids`, `values` [P, 1 + max k] and `rank` [P]."""

    row: np.ndarray
    where: np.ndarray
    k: np.ndarray
    token_ids: Tensor
    values: Tensor
    rank: Tensor

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        return {prefix + "token_ids": self.token_ids, prefix + "values": self.values, prefix + "rank": self.rank}

    def collect(self, host: Mapping[str, np.ndarray], prefix: str, keep: np.ndarray, position: np.ndarray) -> Logprobs:
        """The entries `keep` after their tensors arrived on the host; `position` of all entries."""
        k = self.k[keep]
        width = 1 + int(k.max(initial=0))
        asked = np.arange(width) <= k[:, None]
        return Logprobs(
            row=self.row[keep].astype(np.int32),
            position=position[keep].astype(np.int32),
            token_ids=np.where(asked, host[prefix + "token_ids"][keep, :width], NO_TOKEN).astype(np.int32),
            values=np.where(asked, host[prefix + "values"][keep, :width], -1).astype(np.float32),
            rank=host[prefix + "rank"][keep].astype(np.int32),
        )


def rank_tokens(values: Tensor, chosen: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """values [n, V] float32, chosen [n] → token ids and values [n, 1 + k], rank [n] (1 + tokens with a greater value)."""
    own = values.gather(1, chosen[:, None])
    rank = (values > own).sum(-1) + 1
    top = values.topk(k, -1) if k else None
    if top is None:
        return chosen[:, None], own, rank
    return torch.cat([chosen[:, None], top.indices], 1), torch.cat([own, top.values], 1), rank


def prompt_logprobs(
    plan: StepPlan, shape: Layout, slots: SlotTable, hidden: Tensor, head: Callable[[Tensor], Tensor], rank: Rank, vocab_size: int
) -> LogprobColumns | None:
    """Logprobs of the prompt tokens that follow this chunk's positions, for rows flagged PROMPT_LOGPROBS; None: there are
    none. They are the model's own (no transform, no temperature), ranked by `rank`. Logits are made for a
    bounded number of positions at a time. A prompt's positions precede every draft, so the plan's counts are true here."""
    flagged = (np.asarray(plan.flags) & PROMPT_LOGPROBS) != 0
    if not flagged.any():
        return None
    slot = np.asarray(plan.rows, np.int64)[shape.row]
    position = np.asarray(plan.start, np.int64)[shape.row] + shape.index + 1
    token = np.flatnonzero(flagged[shape.row] & (position < slots.host["num_prompt_tokens"][slot]))
    if not len(token):
        return None
    row, slot, position = shape.row[token], slot[token], position[token]
    k = np.maximum(slots.host["prompt_logprobs"][slot], 0)
    on = upload_columns({"token": token, "slot": slot, "position": position}, hidden.device)
    chosen = slots.tokens[on["slot"], on["position"]].long()
    size = max(1, ELEMENTS_AT_ONCE // vocab_size)
    parts = []
    for at in range(0, len(token), size):
        logits = head(hidden[on["token"][at : at + size]]).float()
        parts.append(rank(logits, chosen[at : at + size], int(k.max())))
    return LogprobColumns(row, position, k, *(torch.cat(column) for column in zip(*parts)))
