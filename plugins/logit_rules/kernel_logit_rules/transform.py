"""The rules on the device: one transform masks, one adds. Both look at the drafts before a row, so they hold under drafts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernel_core.api import Opened, decode
from kernel_core.nn.api import LogitsTransform, StepView, upload
from kernel_logit_rules.ban import ANY
from kernel_logit_rules.request import Rules

Op = Callable[[Tensor, Tensor, StepView], Tensor]
ALWAYS = np.iinfo(np.int32).max


@dataclass(frozen=True, slots=True)
class Bans:
    """Of one slot: `token[i]` is masked while fewer than `until[i]` tokens are out and the output ends with `prefix[i]`
    (right-aligned, padded with ANY on the left)."""

    token: np.ndarray  # [P]
    until: np.ndarray  # [P]
    prefix: np.ndarray  # [P, K]


def make_bans(rules: Rules) -> Bans:
    """Stop tokens (until the minimum) and bad words (always) in one form."""
    width = max((len(ids) - 1 for ids in rules.bad), default=0)
    prefix = np.full((len(rules.stops) + len(rules.bad), width), ANY, np.int64)
    for place, ids in enumerate(rules.bad, len(rules.stops)):
        if len(ids) > 1:
            prefix[place, 1 - len(ids) :] = ids[:-1]
    last = np.array([ids[-1] for ids in rules.bad], np.int64)
    until = np.concatenate([np.full(len(rules.stops), rules.until), np.full(len(rules.bad), ALWAYS)])
    return Bans(np.concatenate([rules.stops.astype(np.int64), last]), until.astype(np.int64), prefix)


class MaskRule(LogitsTransform):
    """allowed_token_ids, bad_words and min_tokens."""

    stage = "mask"
    host = False
    argmax_invariant = False

    def __init__(self, plugin: str, vocab_size: int, device: torch.device, ban: Op) -> None:
        self.plugin, self.vocab_size, self.device, self._ban = plugin, vocab_size, device, ban
        self.allowed: dict[int, Tensor] = {}
        self.bans: dict[int, Bans] = {}

    def opened(self, opened: Opened) -> bool:
        self.closed(opened.slot)
        if self.plugin not in opened.payloads:
            return False
        rules = decode(opened.payloads[self.plugin], Rules)
        if len(rules.allowed):
            mask = np.zeros(self.vocab_size, bool)
            mask[rules.allowed] = True
            self.allowed[opened.slot] = upload(mask, self.device)
        bans = make_bans(rules)
        if len(bans.token):
            self.bans[opened.slot] = bans
        return opened.slot in self.allowed or opened.slot in self.bans

    def closed(self, slot: int) -> None:
        self.allowed.pop(slot, None)
        self.bans.pop(slot, None)

    def apply(self, logits: Tensor, step: StepView) -> Tensor:
        slots = step.host_slot.tolist()
        for slot in {s for s in slots if s in self.allowed}:
            rows = upload(np.flatnonzero(step.host_slot == slot), logits.device)
            logits[rows] = logits[rows].masked_fill(~self.allowed[slot], float("-inf"))
        banned = [row for row, slot in enumerate(slots) if slot in self.bans]
        return self._ban(logits, upload(self._listed(banned, step.host_slot), logits.device), step) if banned else logits

    def _listed(self, rows: Sequence[int], host_slot: np.ndarray) -> np.ndarray:
        """The bans of some logits rows, as the op `ban` takes them."""
        bans = [self.bans[int(host_slot[row])] for row in rows]
        width = max(b.prefix.shape[1] for b in bans)
        wide = [np.pad(b.prefix, ((0, 0), (width - b.prefix.shape[1], 0)), constant_values=ANY) for b in bans]
        row = np.repeat(np.array(rows, np.int64), [len(b.token) for b in bans])
        columns = row, np.concatenate([b.token for b in bans]), np.concatenate([b.until for b in bans])
        return np.column_stack([*columns, np.concatenate(wide)])


class BiasRule(LogitsTransform):
    """logit_bias."""

    stage = "bias"
    host = False
    argmax_invariant = False

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin
        self.bias: dict[int, Rules] = {}

    def opened(self, opened: Opened) -> bool:
        self.closed(opened.slot)
        rules = decode(opened.payloads[self.plugin], Rules) if self.plugin in opened.payloads else None
        if rules is None or not len(rules.bias_ids):
            return False
        self.bias[opened.slot] = rules
        return True

    def closed(self, slot: int) -> None:
        self.bias.pop(slot, None)

    def apply(self, logits: Tensor, step: StepView) -> Tensor:
        rows = [row for row, slot in enumerate(step.host_slot.tolist()) if slot in self.bias]
        if not rows:
            return logits
        rules = [self.bias[int(step.host_slot[row])] for row in rows]
        flat = np.concatenate([row * logits.shape[1] + r.bias_ids.astype(np.int64) for row, r in zip(rows, rules)])
        values = np.concatenate([r.bias for r in rules])
        index, added = (upload(a, logits.device) for a in (flat, values))
        logits.view(-1).scatter_add_(0, index, added)
        return logits
