"""The example plugin's transform against a slow twin, with drafts, trees and requests that did not ask."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kernel_core.api import Opened, SamplingRow
from kernel_core.nn.api import StepView

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "third_party_plugin"
VOCAB, SLOTS, LENGTH = 23, 4, 40


@pytest.fixture
def transform(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from no_repeat.transform import NoRepeat

    yield NoRepeat(SLOTS, torch.device("cpu"))
    for name in [name for name in sys.modules if name.startswith("no_repeat")]:
        del sys.modules[name]


def random_step(rng: np.random.Generator, width: int) -> tuple[StepView, list[list[int]]]:
    """A step of all slots with `width` drafts a row in random trees; and the tokens before each logits row."""
    known = rng.integers(1, LENGTH - width, SLOTS)
    history = rng.integers(0, VOCAB, (SLOTS, LENGTH))
    drafts = np.where(rng.random((SLOTS, width)) < 0.2, -1, rng.integers(0, VOCAB, (SLOTS, width)))
    parents = np.array([[rng.integers(-1, j) if j else -1 for j in range(width)] for _ in range(SLOTS)]).reshape(SLOTS, width)
    slot, ancestors, before = [], [], []
    for s in range(SLOTS):
        for place in range(width + 1):
            path, at = [], place - 1
            while at >= 0:
                path, at = [at, *path], parents[s, at]
            slot.append(s)
            ancestors.append(path + [-1] * (width - len(path)))
            before.append([*history[s, : known[s]].tolist(), *(int(drafts[s, j]) for j in path)])
    slots, depth = torch.tensor(slot), torch.tensor([sum(a >= 0 for a in path) for path in ancestors])
    view = StepView(
        rows=torch.arange(SLOTS),
        lens=torch.tensor(known + width).int(),
        next_token=torch.zeros(SLOTS, dtype=torch.int64),
        token_ids=torch.zeros(0, dtype=torch.int64),
        positions=torch.zeros(1, 0, dtype=torch.int64),
        q_start=torch.zeros(SLOTS + 1).int(),
        slot=slots,
        row=slots,
        draft_pos=torch.arange(width + 1).repeat(SLOTS).int(),
        position=torch.tensor(known)[slots] + depth,
        ancestors=torch.tensor(ancestors, dtype=torch.int32).view(len(slot), width),
        drafts=torch.tensor(drafts, dtype=torch.int64).view(SLOTS, width),
        history=torch.tensor(history, dtype=torch.int32),
        known=torch.tensor(known, dtype=torch.int32),
        num_prompt=torch.ones(SLOTS, dtype=torch.int32),
    )
    return view, before


def opened(slot: int, window: int) -> Opened:
    return Opened(slot, f"r{slot}", np.zeros(1, np.int32), 0, 0, SamplingRow(), {"no_repeat": window.to_bytes(4, "little")})


@pytest.mark.parametrize("width", [0, 1, 4])
@pytest.mark.parametrize("seed", range(20))
def test_exactly_the_last_tokens_are_banned(transform, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    windows = [0, *rng.integers(1, 4, 2).tolist(), int(rng.integers(4, 30))]
    assert [transform.opened(opened(slot, window)) for slot, window in enumerate(windows)] == [w > 0 for w in windows]
    view, before = random_step(rng, width)
    logits = torch.randn(len(before), VOCAB)
    expected = logits.clone()
    for row, tokens in enumerate(before):
        window = windows[int(view.slot[row])]
        banned = [token for token in tokens[len(tokens) - min(window, len(tokens)) :] if token >= 0]
        expected[row, banned] = float("-inf")
    assert torch.equal(transform.apply(logits.clone(), view), expected)


def test_a_closed_slot_bans_nothing(transform) -> None:
    transform.opened(opened(1, 5))
    transform.closed(1)
    view, before = random_step(np.random.default_rng(0), 2)
    logits = torch.randn(len(before), VOCAB)
    assert torch.equal(transform.apply(logits.clone(), view), logits)
