"""Mean accepted length of a head, by its formula in plain torch: no engine is involved."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from head_data import Target, Text, batches, collate
from head_models import STEPS, Batch, Head, head_of
from safetensors.torch import load_file
from torch import Tensor

BATCH_TOKENS = 4096


def load_head(folder: Path, target: Target) -> Head:
    """A head from its published files, in fp32."""
    config = json.loads((folder / "config.json").read_text())
    head = head_of(config, target.embedding)
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in load_file(folder / "model.safetensors").items()}
    head.load_state_dict(tensors)
    return head.eval().to(target.device)


def right_drafts(head: Head, batch: Batch, steps: int = STEPS) -> Tensor:
    """[B, Q] how many of the head's greedy drafts after each pair are what the target says, up to the first other one."""
    drafts, ids = head.unroll(batch, steps), head.target_ids()
    going, right = torch.ones_like(batch.pairs, dtype=torch.bool), torch.zeros_like(batch.pairs)
    for step, draft in enumerate(drafts):
        said = draft.logits.argmax(-1)
        said = said if ids is None else ids[said]
        going = going & batch.counts(step) & (said == batch.token(step + 2))
        right += going
    return right


def walk(right: dict[int, int], said: Sequence[bool]) -> tuple[int, int]:
    """(steps, tokens) of an engine that drafts: it goes on from the last token that a step gained. `right`: how many drafts are
    right after each pair of a text."""
    steps = tokens = place = 0
    for pair in sorted(right):
        if pair < place or not said[pair + 2]:
            continue
        end = pair + 2 + right[pair]  # what the target draws after the drafts that were right
        gained = right[pair] + (end < len(said) and said[end])
        steps, tokens, place = steps + 1, tokens + gained, pair + gained
    return steps, tokens


@torch.inference_mode()
def accepted_length(head: Head, texts: list[Text], device: torch.device, steps: int = STEPS) -> float:
    """Tokens gained per step (1 + accepted), greedy, with `steps` drafts a step, over texts that the target generated."""
    done = gained = 0
    for part in batches(texts, BATCH_TOKENS):
        batch = collate(part, device)
        rows = zip(part, batch.pairs.tolist(), right_drafts(head, batch, steps).tolist())
        for text, pairs, right in rows:
            # padding repeats the last pair and is never right: the first of the same pair counts
            counted = walk(dict(zip(reversed(pairs), reversed(right))) if any(text.said) else {}, text.said)
            done, gained = done + counted[0], gained + counted[1]
    return gained / done
