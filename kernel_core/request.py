"""Requests and their outputs, as users see them (`SamplingParams`, `RequestOutput`) and as the scheduler does (`Request`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np

from kernel_core.errors import RequestError
from kernel_core.plan import MOST_DRAFTS, Job, Logprobs, SamplingRow, Span

GREEDY_BELOW = 1e-5  # temperatures below are greedy
MIN_TEMPERATURE = 0.01  # smaller ones that are not greedy are raised to it
_LARGEST = 1e38  # a float32 in the worker
_INTEGERS = ("n", "top_k", "max_tokens", "seed", "logprobs", "prompt_logprobs", "priority", "max_drafts")
_FLAGS = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")
_KINDS = dict.fromkeys(_INTEGERS, (Integral, "an integer")) | dict.fromkeys(("temperature", "top_p", "min_p"), (Real, "a number"))
_OPTIONAL = {"max_tokens", "seed", "logprobs", "prompt_logprobs", "max_drafts"}


@dataclass(slots=True)
class SamplingParams:
    """How one request is sampled and when it stops.

    The kernel's own fields are below; build it with `SamplingParams.of(...)` (or the `LLM` methods' keywords) to also pass
    fields that plugins registered (`presence_penalty`, `logit_bias`, ...): they are kept in `fields`, and a request that
    carries one nobody registered is refused by name.

    top_k 0 or -1, top_p 1 and min_p 0 are off; temperature 0 is greedy. `max_tokens` None means up to the model's limit.
    `stop` strings are matched on text, `stop_token_ids` on ids; `ignore_eos` keeps going past the model's end tokens.
    `seed` is the 64-bit key of the random draws (None: drawn at arrival). `logprobs`/`prompt_logprobs`: number of
    alternatives, -1 the whole vocabulary. `priority`: lower is sooner (needs a policy that reads it). `max_drafts`: most
    drafts in a step, 0 none, None as many as the drafter has; it never changes a token, so it is no error without a drafter.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    priority: int = 0
    max_drafts: int | None = None
    fields: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **given: Any) -> SamplingParams:
        """Kernel fields by name, everything else into `fields`."""
        own = {name: given.pop(name) for name in list(given) if name in KERNEL_FIELDS}
        return cls(**own, fields=given)

    def __post_init__(self) -> None:
        self._check_kinds()
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        if self.seed == -1:
            self.seed = None
        if self.top_k == -1:
            self.top_k = 0
        if GREEDY_BELOW <= self.temperature < MIN_TEMPERATURE:
            self.temperature = MIN_TEMPERATURE

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def _check_kinds(self) -> None:
        for name, (kind, words) in _KINDS.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and (isinstance(value, bool) or not isinstance(value, kind)):
                raise RequestError(f"{name} must be {words}, got {value!r}")
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if not _all_are(str, self.stop):
            raise RequestError(f"stop must be a text or a list of texts, got {self.stop!r}")
        if not _all_are(Integral, self.stop_token_ids):
            raise RequestError(f"stop_token_ids must be a list of token ids, got {self.stop_token_ids!r}")

    def validate(self) -> None:
        """Raise `RequestError` naming the first field that is of another kind or out of range."""
        self._check_kinds()
        checks = (
            (isinstance(self.n, int) and self.n >= 1, "n must be at least 1"),
            (0 <= self.temperature <= _LARGEST, "temperature must be 0 (greedy) or a positive number"),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]"),
            (self.top_k >= 0, "top_k must be 0 or -1 (off) or positive"),
            (0 <= self.min_p <= 1, "min_p must be in [0, 1]"),
            (self.max_tokens is None or self.max_tokens >= 1, "max_tokens must be at least 1"),
            (all(self.stop or ["x"]), "stop must not contain an empty string"),
            (self.detokenize or not self.stop, "stop strings need detokenize=True"),
            (self.n == 1 or not self.greedy, "n > 1 with temperature 0 would give n equal texts; use temperature > 0"),
            (self.logprobs is None or self.logprobs >= -1, "logprobs must be -1 or more"),
            (self.prompt_logprobs is None or self.prompt_logprobs >= -1, "prompt_logprobs must be -1 or more"),
            (self.seed is None or 0 <= self.seed < 2**64, "seed must be in [0, 2**64)"),
            (self.max_drafts is None or self.max_drafts >= 0, "max_drafts must be 0 (no drafts) or more"),
        )
        for passed, message in checks:
            if not passed:
                name = message.split()[0]
                raise RequestError(f"{message}, got {name} = {getattr(self, name)!r}")

    def row(self, num_prompt_tokens: int, vocab_size: int) -> SamplingRow:
        """The numbers a worker needs; greedy rows have every filter off."""
        logprobs, prompt_logprobs = (_width(k, vocab_size) for k in (self.logprobs, self.prompt_logprobs))
        drafts = MOST_DRAFTS if self.max_drafts is None else min(self.max_drafts, MOST_DRAFTS)
        rest = (logprobs, prompt_logprobs, num_prompt_tokens, drafts)
        if self.greedy:
            return SamplingRow(0.0, 0, 1.0, 0.0, *rest)
        return SamplingRow(self.temperature, self.top_k, self.top_p, self.min_p, *rest)


def _all_are(kind: type, values: Any) -> bool:
    return values is None or (isinstance(values, Iterable) and all(isinstance(v, kind) for v in values))


def _width(asked: int | None, vocab_size: int) -> int:
    """Logprobs as workers count them: -1 none."""
    if asked is None:
        return -1
    return vocab_size if asked == -1 else asked


KERNEL_FIELDS = frozenset(SamplingParams.__dataclass_fields__) - {"fields"}


@dataclass(slots=True)
class Request:
    """One sequence inside the engine (n completions of a prompt are n of them, of one `family`).

    Made by the face, owned by the scheduler from `add` to its finish. `max_len` bounds prompt + output tokens.
    `resources` maps a resource name to what is asked of it; `gates` are the names that must open before admission."""

    id: str
    token_ids: np.ndarray  # prompt, int32
    sampling: SamplingRow
    key: int
    max_len: int
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    arrival: int = 0
    family: str | None = None
    payloads: dict[str, bytes] = field(default_factory=dict)
    spans: tuple[Span, ...] = ()
    identity: bytes = b""  # what else, besides the tokens, the KV of this request depends on (adapter, salt)
    jobs: tuple[Job, ...] = ()
    gates: tuple[str, ...] = ()
    resources: Mapping[str, Any] = field(default_factory=dict)
    flags: int = 0


#: finish codes in `Updates.finish`, by column
FINISH_REASONS = (None, "stop", "length", "abort", "error")
RUNNING, STOP, LENGTH, ABORT, ERROR = range(5)


@dataclass(frozen=True, slots=True)
class Updates:
    """What one commit changed, in columns: request i got tokens[offsets[i]:offsets[i + 1]]; no object per token or row."""

    requests: tuple[str, ...]
    tokens: np.ndarray
    offsets: np.ndarray  # [len(requests) + 1]
    finish: np.ndarray  # [len(requests)] index into FINISH_REASONS
    stop_token: np.ndarray  # [len(requests)] the stop id that ended it, or -1
    cached: Mapping[str, int] = field(default_factory=dict)  # hit tokens of requests first scheduled in this step
    logprobs: Logprobs | None = None  # `row` indexes `requests`
    prompt_logprobs: Logprobs | None = None
    outputs: tuple[tuple[str, str, np.ndarray], ...] = ()  # (request, name, array)
    errors: Mapping[str, str] = field(default_factory=dict)
    drafted: np.ndarray | None = None  # [len(requests)] drafts that this step verified; None: none at all
    accepted: np.ndarray | None = None  # [len(requests)] of those, accepted
    planned_at: float | None = None  # time.monotonic() when the step was planned; given where `cached` says something


# ---- what users get ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Logprob:
    """Natural-log probability (or logit, by the mode) of one token; rank is 1-based."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class DraftCounts:
    """How drafts did in an engine so far: `steps` counts rows that verified any, `drafted` and `accepted` tokens,
    `by_place[j]` how many rows accepted more than j drafts."""

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    by_place: list[int] = field(default_factory=list)

    @property
    def mean_length(self) -> float:
        """Tokens that such a row gained on average: 1 + accepted / steps."""
        return 1 + self.accepted / max(self.steps, 1)

    def add(self, drafted: np.ndarray, accepted: np.ndarray) -> None:
        """The rows of one step [n]."""
        self.steps += int(np.count_nonzero(drafted))
        self.drafted += int(drafted.sum())
        self.accepted += int(accepted.sum())
        most = int(accepted.max(initial=0))
        self.by_place += [0] * (most - len(self.by_place))
        for place in range(most):
            self.by_place[place] += int(np.count_nonzero(accepted > place))


@dataclass(slots=True)
class CompletionOutput:
    """One completion. finish_reason: "stop", "length", "abort", "error" or None while running; stop_reason: the stop
    string or token id that ended it, None for the model's end token."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    outputs: dict[str, Any] = field(default_factory=dict)  # named outputs of plugins
    num_drafted: int = 0  # draft tokens that were verified for it
    num_accepted: int = 0  # of those, accepted


@dataclass(slots=True)
class RequestTimings:
    """Seconds on the monotonic clock, relative to arrival; None until it happened. `queued`: until it was first scheduled."""

    arrival: float = 0.0  # absolute, time.monotonic()
    first_token: float | None = None
    finished: float | None = None
    queued: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """What the engine knows of one user request after a step. `prompt_logprobs[0]` is None: nothing precedes it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    timings: RequestTimings = field(default_factory=RequestTimings)
    error: str | None = None
