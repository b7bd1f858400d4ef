"""A step between its submission and its result: device tensors on their way to the host, and what they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from kernel_core.nn.draft_length import DraftOutcome
from kernel_core.nn.inputs import Layout
from kernel_core.nn.logprobs import LogprobColumns
from kernel_core.nn.transfer import Download
from kernel_core.plan import Ack, Logprobs, StepPlan, StepResult

UNUSABLE = "the model gave NaN, or no token is allowed"


@dataclass(slots=True)
class Pending:
    """A submitted step. `settle` tells the runner that it is over, before the result is made. `whole`: what was planned, and
    which of its rows [R] bool `plan` has; the others are lost. `reasons`: by slot, why its request cannot go on."""

    plan: StepPlan
    layout: Layout | None = None
    download: Download | None = None
    logprobs: LogprobColumns | None = None
    prompt: LogprobColumns | None = None
    acks: tuple[Ack, ...] = ()
    timings: dict[str, float] = field(default_factory=dict)
    settle: Callable[[Pending], None] | None = None
    observe: Callable[[DraftOutcome], None] | None = None  # the drafter's length's
    asked: bool = False  # was the drafter?
    started: float = 0.0  # on the clock of perf_counter
    arrays: dict[str, np.ndarray] | None = None
    whole: tuple[StepPlan, np.ndarray] | None = None
    oversized: bool = False
    reasons: Mapping[int, str] = field(default_factory=dict)

    def wait(self) -> dict[str, np.ndarray]:
        """The step's host arrays. Called in order of submission."""
        if self.arrays is None:
            self.arrays = self.download.arrays() if self.download else {}
        return self.arrays

    def result(self) -> StepResult:
        """Wait and make the result. Called once."""
        result = self._result()
        return result if self.whole is None else result.spread(*self.whole, self.oversized)

    def _result(self) -> StepResult:
        if self.settle is not None:
            self.settle(self)
        host, empty = self.wait(), np.zeros(0, np.int32)
        if self.download is None:
            nothing = np.zeros(1, np.int32)
            return StepResult(self.plan.plan_id, empty, nothing, empty, empty, empty, empty, acks=self.acks, timings=self.timings)
        tokens, numbers, bad = host["tokens"], host["numbers"], host["bad"]
        count, accepted, drafted, computed, drafts = numbers
        if self.observe is not None:
            self.observe(self._outcome(drafted, accepted, int(drafts.sum()) if self.asked else 0))
        kept = np.arange(tokens.shape[1]) < count[:, None]
        slots = self.plan.rows
        return StepResult(
            self.plan.plan_id,
            tokens=tokens[kept],
            offsets=np.concatenate([[0], np.cumsum(count)]).astype(np.int32),
            computed=computed,
            drafted=drafted,
            accepted=accepted,
            drafts=drafts,
            logprobs=self._logprobs(host, count),
            prompt_logprobs=self._prompt_logprobs(host),
            acks=self.acks,
            failed=tuple((int(slots[r]), self.reasons.get(int(slots[r]), UNUSABLE)) for r in np.flatnonzero(bad)),
            timings=self.timings,
        )

    def _outcome(self, drafted: np.ndarray, accepted: np.ndarray, proposed: int) -> DraftOutcome:
        plan = self.plan
        decode_only = bool((plan.q == plan.room).all() and plan.room.all())
        seconds = perf_counter() - self.started
        own = self.timings.get("propose", 0.0)
        rows, asked = plan.rows.astype(np.int64), self.asked
        return DraftOutcome(rows, drafted, accepted, decode_only, seconds, own, proposed, asked)

    def _logprobs(self, host: Mapping[str, np.ndarray], count: np.ndarray) -> Logprobs | None:
        """Those of the places that the accepted path went through, in path order."""
        if self.logprobs is None:
            return None
        row, draft = self.logprobs.row, self.layout.logits_draft[self.logprobs.where]
        order = host["order"][row, draft]  # how many drafts were accepted before this place, -1: not on the path
        return self.logprobs.collect(host, "logprobs.", (order >= 0) & (order < count[row]), host["known"][row] + order)

    def _prompt_logprobs(self, host: Mapping[str, np.ndarray]) -> Logprobs | None:
        if self.prompt is None:
            return None
        return self.prompt.collect(host, "prompt.", np.ones(len(self.prompt.row), bool), self.prompt.where)
