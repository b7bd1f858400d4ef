"""A matcher per slot, and the masks of a step: filled in the host turn, while the forward runs, in parallel over slots."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from kernel_core.api import Opened, RequestError, decode
from kernel_core.nn.api import HostTurn, LogitsTransform, StepView
from kernel_guided_decoding.backends import Matcher
from kernel_guided_decoding.compiler import Compiler
from kernel_guided_decoding.request import Guide


@dataclass(slots=True)
class Guided:
    """One slot's matcher, advanced over all tokens that are known. `extra` are ends besides the model's own end tokens. Once
    there is a `problem`, the request ends with it."""

    matcher: Matcher | None
    ends: frozenset[int]
    extra: np.ndarray
    problem: str = ""

    def advance(self, tokens: Sequence[int]) -> None:
        tokens = [token for token in tokens if token not in self.ends]
        if self.matcher is not None and tokens and not self.problem:
            self.problem = self.matcher.advance(tokens)


class GrammarMasks(LogitsTransform):
    """Implements `LogitsTransform`, host."""

    stage = "mask"
    host = True
    argmax_invariant = False

    def __init__(self, plugin: str, compiler: Compiler, threads: int) -> None:
        self.plugin, self.compiler = plugin, compiler
        self.slots: dict[int, Guided] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="guided_decoding_masks")

    def opened(self, opened: Opened) -> bool:
        """After a preemption the known output is matched again."""
        self.closed(opened.slot)
        payload = opened.payloads.get(self.plugin)
        if payload is None:
            return False
        guide = decode(payload, Guide)
        ends = frozenset(guide.ends)
        matcher, problem = None, ""
        try:
            matcher = self.compiler.matcher(payload)
        except (RequestError, TimeoutError) as error:
            problem = str(error) or "the grammar took too long to compile again"
        extra = np.array(sorted(ends - set(guide.eos)), np.int64)
        guided = self.slots[opened.slot] = Guided(matcher, ends, extra, problem)
        guided.advance(opened.token_ids[opened.sampling.num_prompt_tokens :].tolist())
        return True

    def closed(self, slot: int) -> None:
        self.slots.pop(slot, None)

    def apply(self, logits: Tensor, step: StepView) -> Tensor:
        return logits

    def fill(self, turn: HostTurn) -> None:
        """Slots without drafts in one call of the library's own threads, those with drafts in ours."""
        plain, trees, guides = [], [], [self.slots[slot] for slot in turn.slots.tolist()]
        for place, guided in enumerate(guides):
            guided.advance(turn.tokens[place].tolist())
            if guided.problem:
                continue
            if (turn.drafts[place] >= 0).any():
                trees.append((guided, turn.drafts[place].tolist(), turn.parents[place].tolist(), turn.mask[place]))
            else:
                plain.append((place, guided))
        if plain:
            self._fill_plain(plain, turn.mask)
        if len(trees) == 1:
            fill_tree(*trees[0])
        elif trees:
            list(self._pool.map(lambda tree: fill_tree(*tree), trees))
        for slot, guided in zip(turn.slots.tolist(), guides):
            if guided.problem:
                turn.failed[slot] = f"the grammar cannot be followed any further: {guided.problem}"

    def _fill_plain(self, plain: Sequence[tuple[int, Guided]], mask: np.ndarray) -> None:
        rows = np.zeros((len(plain), mask.shape[2]), np.uint32)
        matchers = [guided.matcher for _, guided in plain if guided.matcher is not None]
        problems = self.compiler.fill(matchers, rows)
        for row, (place, guided) in enumerate(plain):
            guided.problem = problems[row]
            mask[place, 0] = rows[row]
            finish_row(guided, mask[place, 0])
            guided.problem = guided.problem or dead_end(mask[place, 0])


def dead_end(row: np.ndarray) -> str:
    """After the last token; after a draft it matters only if the draft is accepted, and is seen then."""
    return "" if row.any() else "no token can come next"


def fill_tree(guided: Guided, drafts: Sequence[int], parents: Sequence[int], rows: np.ndarray) -> None:
    """The rows [1 + m, words] of one slot. Rows after a draft that the grammar refuses stay all ones: nobody gets there."""
    matcher = guided.matcher
    assert matcher is not None
    _fill_row(guided, rows[0])
    guided.problem = guided.problem or dead_end(rows[0])
    paths: dict[int, list[int]] = {-1: []}  # by draft: itself and the drafts before it
    at: list[int] = []  # drafts that the matcher has consumed
    for draft, (token, parent) in enumerate(zip(drafts, parents)):
        before = paths.get(parent)
        if token < 0 or before is None or token in guided.ends:
            continue
        shared = next((i for i, (a, b) in enumerate(zip(at, before)) if a != b), min(len(at), len(before)))
        if len(at) > shared:
            matcher.rollback(len(at) - shared)
        again = [drafts[number] for number in before[shared:]]
        at = list(before)
        if again:
            matcher.advance(again)
        if matcher.try_advance(token):
            at = paths[draft] = [*before, draft]
            _fill_row(guided, rows[1 + draft])
    if at:
        matcher.rollback(len(at))


def _fill_row(guided: Guided, row: np.ndarray) -> None:
    assert guided.matcher is not None
    guided.problem = guided.problem or guided.matcher.fill(row)
    finish_row(guided, row)


def finish_row(guided: Guided, row: np.ndarray) -> None:
    """Tokens that end the request are allowed exactly where the grammar accepts."""
    if guided.problem or not len(guided.extra):
        return
    assert guided.matcher is not None
    bits = np.uint32(1) << (guided.extra % 32).astype(np.uint32)
    accepting = guided.matcher.accepting()
    for word, bit in zip(guided.extra // 32, bits):
        row[word] = row[word] | bit if accepting else row[word] & ~bit
