"""Dynamic trees of EAGLE-2 (https://arxiv.org/abs/2406.16858): on each level the most probable nodes are continued, and of all
nodes the most probable are drafted. A node's score is the sum of the log-probabilities on its path."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: tokens [R, n] and parents [R, n] of the nodes to continue, k more than in the call before → logits [R, k, V] of the last k
Continue = Callable[[Tensor, Tensor], Tensor]


def candidates(logits: Tensor, go_on: Continue, top_k: int, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [R, V] after the last known token → tokens [R, C] int64, parents [R, C] int64 (an earlier candidate, -1: the last
    known token) and scores [R, C] float32. A continued node has `top_k` candidates; each level but the last has `top_k` such
    nodes."""
    scores, tokens = logits.float().log_softmax(-1).topk(top_k, -1)
    parents = torch.full_like(tokens, -1)
    level = torch.arange(top_k, device=tokens.device).expand_as(tokens)
    nodes = level[:, :0]
    for _ in range(depth - 1):
        new = level.gather(1, scores.gather(1, level).topk(top_k, -1).indices)
        nodes = torch.cat([nodes, new], 1)
        after = go_on(tokens.gather(1, nodes), _among(nodes, parents.gather(1, nodes), tokens.shape[1]))
        best = (scores.gather(1, new)[..., None] + after.float().log_softmax(-1)).topk(top_k, -1)
        level = tokens.shape[1] + torch.arange(top_k**2, device=tokens.device).expand(len(tokens), -1)
        tokens, scores = torch.cat([tokens, best.indices.flatten(1)], 1), torch.cat([scores, best.values.flatten(1)], 1)
        parents = torch.cat([parents, new.repeat_interleave(top_k, 1)], 1)
    return tokens, parents, scores


def most_probable(tokens: Tensor, parents: Tensor, scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` candidates of the highest scores: tokens [R, number], -1 for impossible ones, and parents [R, number] among
    themselves. No child scores above its parent, which comes before it, so a stable sort keeps whole paths."""
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :number].sort(-1).values
    kept = tokens.gather(1, chosen).masked_fill(scores.gather(1, chosen).isneginf(), -1)
    return kept, _among(chosen, parents.gather(1, chosen), tokens.shape[1])


def _among(chosen: Tensor, parents: Tensor, count: int) -> Tensor:
    """Parents [R, n] of the chosen of `count` candidates [R, n], as places among the chosen; -1 stays."""
    place = chosen.new_full((len(chosen), count), -1)
    place.scatter_(1, chosen, torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen))
    return torch.where(parents >= 0, place.gather(1, parents.clamp(min=0)), -1)
