"""A tree of candidates: the most probable tokens of every stage, of which the most probable paths are drafted."""

from __future__ import annotations

import torch
from torch import Tensor

from kernel_mlp_speculator.module import Stages


def candidates(stages: Stages, state: Tensor, token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """state [N, D], token [N] → tokens [N, C] int64, parents [N, C] int64 (index of an earlier candidate, -1: the token
    itself) and scores [N, C] float32, the log of the product of probabilities on the path."""
    rows, device = len(token), token.device
    beams, index, score = 1, torch.full((rows, 1), -1, device=device), torch.zeros(rows, 1, device=device)
    tokens, parents, scores = [], [], []
    for number, width in enumerate(stages.config.top_k):
        state, logits = stages(number, state, token)
        best = logits.float().log_softmax(-1).view(rows, beams, -1).topk(width, -1)
        tokens.append(best.indices.flatten(1))
        parents.append(index.repeat_interleave(width, 1))
        scores.append((score[..., None] + best.values).flatten(1))
        # the best of this stage go on
        first = sum(t.shape[1] for t in tokens[:-1])
        going = scores[-1].topk(min(stages.config.n_candidates, beams * width), -1).indices
        state = state.view(rows, beams, -1).gather(1, (going // width)[..., None].expand(-1, -1, state.shape[-1])).flatten(0, 1)
        token, score, index = tokens[-1].gather(1, going).flatten(), scores[-1].gather(1, going), first + going
        beams = going.shape[1]
    return torch.cat(tokens, 1), torch.cat(parents, 1), torch.cat(scores, 1)


def most_probable(tokens: Tensor, parents: Tensor, scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` candidates of the highest scores as tokens [N, number] and parents [N, number] among themselves. A parent is
    never less probable than its child and comes before it, so a stable sort keeps it with its child."""
    chosen = scores.sort(dim=-1, descending=True, stable=True).indices[:, :number].sort(-1).values
    place = torch.full_like(parents, -1)
    place.scatter_(1, chosen, torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen))
    parent = parents.gather(1, chosen)
    return tokens.gather(1, chosen), torch.where(parent >= 0, place.gather(1, parent.clamp(min=0)), -1)
