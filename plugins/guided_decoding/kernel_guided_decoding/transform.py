"""The masks: a matcher for every guided slot, advanced by what the slot gained, asked before every step and for every draft."""

from __future__ import annotations

import logging
from collections import defaultdict

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

from kernel_core.api import Opened, decode
from kernel_core.nn.api import HostTurn, LogitsTransform
from kernel_guided_decoding.compiled import Grammars
from kernel_guided_decoding.request import Guide

logger = logging.getLogger("kernel_guided_decoding")


class GrammarMask(LogitsTransform):
    """A host transform: `fill` runs while the forward is in flight."""

    stage = "mask"
    host = True
    argmax_invariant = False

    def __init__(self, plugin: str, grammars: Grammars) -> None:
        self.plugin, self.grammars = plugin, grammars
        self.executor = LLExecutor()
        self.matchers: dict[int, LLMatcher] = {}

    def opened(self, opened: Opened) -> bool:
        """A request that was preempted comes back with what it had generated."""
        self.closed(opened.slot)
        data = opened.payloads.get(self.plugin)
        if data is None:
            return False
        matcher = self.grammars.matcher(decode(data, Guide))
        matcher.consume_tokens([int(token) for token in opened.token_ids[opened.sampling.num_prompt_tokens :]])
        self.matchers[opened.slot] = matcher
        return True

    def closed(self, slot: int) -> None:
        self.matchers.pop(slot, None)

    def fill(self, turn: HostTurn) -> None:
        places, words = turn.mask.shape[1], turn.mask.shape[2]
        rows = turn.mask.view(np.int32).reshape(-1, words)
        work = []
        for number, slot in enumerate(turn.slots.tolist()):
            matcher = self.matchers[slot]
            matcher.consume_tokens(turn.tokens[number].tolist())
            if matcher.is_error():
                logger.error("a grammar cannot go on, its request ends: %s", matcher.get_error())
                rows[number * places] = 0
            else:
                work.append((matcher, number * places, number))
        fill_next_token_bitmask_par(self.executor, [(matcher, row) for matcher, row, _ in work], rows)
        for matcher, row, number in work:
            if (turn.drafts[number] >= 0).any():
                fill_drafts(matcher, turn.drafts[number], turn.parents[number], rows[row + 1 : row + places])

    def apply(self, logits, step):  # noqa: ANN001, ANN201 - never called: see `host`
        raise NotImplementedError


def fill_drafts(matcher: LLMatcher, drafts: np.ndarray, parents: np.ndarray, rows: np.ndarray) -> None:
    """The mask after every draft that the grammar allows; the others are masked where they are drawn, so what comes after them
    does not count. `drafts`, `parents` [m]; rows int32 [m, words]. The matcher is afterwards where it was."""
    children: dict[int, list[int]] = defaultdict(list)
    for number in np.flatnonzero(drafts >= 0).tolist():
        children[int(parents[number])].append(number)

    def visit(place: int) -> None:
        for number in children[place]:
            if matcher.try_consume_tokens([int(drafts[number])]) == 1:
                matcher.unsafe_compute_mask_ptr(rows[number].ctypes.data, rows[number].nbytes)
                visit(number)
                matcher.rollback(1)

    visit(-1)
