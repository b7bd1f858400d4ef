"""Protocols that hooks return, torch-free side (face and engine). Worker-side ones are in `kernel_core.nn.protocols`.

Rates: *build* (once), *request* (once per request), *step* (once per step), never per token. Step-rate methods of this
module are host methods: numpy in, numpy out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kernel_core.plan import Allocation, Job, Span, StepPlan, StepResult, WorkerReport
from kernel_core.request import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestView:
    """Engine-side view of one request; a snapshot, never updated."""

    id: str
    arrival: int
    priority: int
    num_prompt: int
    known: int
    committed: int
    planned: int
    cached: int
    payload: bytes | None


@runtime_checkable
class Policy(Protocol):
    """Answers three questions about requests; the kernel keeps the heaps, so order costs nothing per step.
    Engine part, host. May not keep references to views."""

    def key(self, request: RequestView) -> tuple[Any, ...]:
        """Sort key, smallest first; the kernel appends the arrival number. Rate: on arrival, on preemption, on refresh."""
        ...

    def refresh(self) -> Sequence[str]:
        """Ids of waiting requests whose key changed since the last call. Rate: step."""
        ...

    def chunk(self, request: RequestView, remaining: int, budget: int) -> int:
        """How many of the `remaining` uncomputed tokens to take now, 0..min(remaining, budget). Rate: per prefill row."""
        ...

    def victim(self, running: Sequence[RequestView]) -> str:
        """Which running request loses its blocks when the pool is empty. Rate: on shortage only."""
        ...


@runtime_checkable
class Resource(Protocol):
    """Something bounded that a request holds while it has a slot. Both verbs are idempotent per (request, amount)."""

    name: str

    def reserve(self, request_id: str, want: Any) -> bool:
        """Try to take what the request asks (`Request.resources[name]`). False: not now. Rate: per admission attempt."""
        ...

    def release(self, request_id: str) -> None:
        """Give it back; unknown ids are ignored. Rate: on closing of a slot, and when another resource refused."""
        ...


@runtime_checkable
class Handle(Protocol):
    """One submitted step."""

    def result(self) -> StepResult:
        """Wait for it. Raises EngineDeadError when a worker is gone. Called once, in order of submission."""
        ...


@runtime_checkable
class Executor(Protocol):
    """Runs plans on one or more ranks. Engine part. `start` → `allocate` → many `submit` → `close`."""

    def start(self) -> WorkerReport:
        """Open devices, build the model, load weights, measure memory. Rate: build. Raises CapacityError, PluginError."""
        ...

    def allocate(self, allocation: Allocation) -> None:
        """Allocate KV and slots on every rank. Rate: build."""
        ...

    def submit(self, plan: StepPlan) -> Handle:
        """Start a step and return at once where the device can; plans run in order. Rate: step."""
        ...

    def call(self, method: str, payload: bytes) -> list[bytes]:
        """Run the registered call "plugin.name" on every rank between steps; one answer a rank. Rate: rare."""
        ...

    def close(self) -> None:
        """Stop every rank; idempotent; never hangs longer than its own stated limit."""
        ...


@dataclass(slots=True)
class Prepared:
    """A request on its way through the `prepare_request` chain; each plugin adds what is its own.

    Mutable fields may be appended to; `token_ids` may be replaced (int32 array) by plugins that expand placeholders."""

    request_id: str
    prompt: Any  # as given by the user: str, ids or a dict with plugin keys
    params: SamplingParams
    fields: Mapping[str, Any]  # validated values of this plugin's registered fields
    token_ids: np.ndarray
    payloads: dict[str, bytes] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    identity: list[bytes] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)
    resources: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class RequestPreparer(Protocol):
    """Face part. Returned by `prepare_request`."""

    def prepare(self, request: Prepared) -> None:
        """Read `request.fields`, add payloads, spans, identity, jobs, gates, resources. Raise RequestError (it becomes a
        400 for that request only). Rate: request."""
        ...


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What an engine-part observer sees of one step. Seconds on the monotonic clock; arrays are the plan's own."""

    plan: StepPlan
    result: StepResult
    planned_at: float
    committed_at: float
    running: int
    waiting: int
    free_blocks: tuple[int, ...]


@runtime_checkable
class Observer(Protocol):
    """Read-only; may not raise into the loop (an error disables it and is reported once)."""

    def step(self, record: StepRecord) -> None:
        """Rate: step, after commit."""
        ...

    def finished(self, request_id: str, reason: str, num_prompt: int, num_output: int) -> None:
        """Rate: request."""
        ...


@runtime_checkable
class TextCodec(Protocol):
    """Service "text/1": tokens to text and back. Face part."""

    eos_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token(self, token_id: int) -> str: ...
    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Messages to prompt token ids; options: tools, template, add_generation_prompt, template_args."""
        ...

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> TextStream:
        """Start the incremental text of one completion."""
        ...


@runtime_checkable
class TextStream(Protocol):
    """Incremental text of one completion."""

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None, int]:
        """Feed new tokens, get (text that is final, matched stop string or None, how many of these tokens count).
        Half characters and possible beginnings of stop strings are held back."""
        ...

    def flush(self) -> str:
        """What was held back, at the end of a completion that no stop string ended."""
        ...


@runtime_checkable
class CheckpointFormat(Protocol):
    """Returned by `make_checkpoint`; reads one format. Face (`inspect`) and worker (`tensors`)."""

    format: str

    def recognises(self, path: str) -> bool: ...
    def inspect(self, path: str) -> Any:
        """→ ModelInfo, without reading weights. Rate: build."""
        ...

    def tensors(self, path: str) -> Any:
        """→ iterator of (name, torch tensor) in file order, memory-mapped where the format allows. Rate: build, reload."""
        ...


Call = Callable[[bytes], bytes]
