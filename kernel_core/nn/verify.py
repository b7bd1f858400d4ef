"""Verification of drafts: draw every drafted position as plain sampling would, accept while draft equals draw.

A draft can so change how many tokens a step gains, never which. Chains and trees are the same walk from the last known
token: in a tree it goes on to the child that equals the draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
