# pyright: reportReturnType=false
# Docstrings are the bodies here.
"""Protocols that hooks return, torch-free side (face and engine). Worker-side ones are in `kernel_core.nn.protocols`.

Rates: *build* (once), *request* (once per request), *step* (once per step), never per token. Step-rate methods of this
module are host methods: numpy in, numpy out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from kernel_core.plan import Ack, Allocation, Job, Span, StepPlan, StepResult, WorkerReport
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
    expected_hit: int = 0  # tokens that a prefix index would spare it now; only for policies with `reads_hits`, else 0
    payloads: Mapping[str, bytes] = field(default_factory=dict, compare=False, repr=False)  # of all plugins


@runtime_checkable
class Policy(Protocol):
    """Answers three questions about requests; the kernel keeps the heaps, so order costs nothing per step.
    Engine part, host. May not keep references to views. An attribute `reads_hits = True` makes the kernel look up
    `RequestView.expected_hit` for every view that `key` is given."""

    def key(self, request: RequestView) -> tuple[Any, ...]:
        """Sort key, smallest first; the kernel appends the arrival number. Rate: on arrival, on preemption, on refresh."""

    def refresh(self) -> Sequence[str]:
        """Ids of waiting requests whose key changed since the last call. Rate: step."""

    def chunk(self, request: RequestView, remaining: int, budget: int) -> int:
        """How many of the `remaining` uncomputed tokens to take now, 0..min(remaining, budget). Rate: per prefill row."""

    def victim(self, running: Sequence[RequestView]) -> str:
        """Which running request loses its blocks when the pool is empty. Rate: on shortage only."""


@runtime_checkable
class Resource(Protocol):
    """Something bounded that a request holds while it has a slot. Both verbs are idempotent per (request, amount)."""

    name: str

    def reserve(self, request_id: str, want: Any) -> bool:
        """Try to take what the request asks (`Request.resources[name]`). False: not now. Rate: per admission attempt."""

    def release(self, request_id: str) -> None:
        """Give it back; unknown ids are ignored. Rate: on closing of a slot, and when another resource refused."""


@dataclass(slots=True)
class PrefixRequest:
    """A request as a prefix index sees it, the same object from its first look-up until it ends or is preempted.

    `token_ids` int32: all tokens known of it (prompt; after a preemption also output), read-only. `identity` and the keys of
    `spans` are what its KV depends on besides tokens. `memo` belongs to the index: what it computed of the request."""

    id: str
    token_ids: np.ndarray
    identity: bytes
    spans: tuple[Span, ...]
    memo: Any = None


@dataclass(frozen=True, slots=True)
class PrefixHit:
    """What an index found. KV of the first `tokens` positions is there: in group g in the blocks `ids[g]` (int32), which stand in
    columns first[g], first[g] + 1, ... up to the one with position tokens - 1. When `tokens` is no multiple of the block size,
    the last of them is used in part: the kernel copies these tokens; the other blocks are shared.

    `owner`: a running slot that is computing more of this prefix, or -1; when it has committed `until` tokens, that much will
    match."""

    tokens: int
    ids: tuple[np.ndarray, ...]
    first: tuple[int, ...]
    owner: int = -1
    until: int = 0


@runtime_checkable
class PrefixIndex(Protocol):
    """Finds the KV of tokens that were computed before. Engine part, host, deterministic: its answers depend on the calls before
    only. One thread. Every method is O(1) per block that it is about.

    A block (int id, per KV group) holds the KV of `block_size` positions, the same columns in every group. The kernel owns
    reference counts; the index knows which content a block has and which *idle* block (kept, and used by nobody) goes first when
    the pool needs one. A block is kept from the `insert` that returned True for it until `evict` returned it, `drop` named it,
    or `reset`. Two blocks with the same content need not both be kept.

    Identity: two positions have the same KV only if all tokens up to them, `identity`, and the spans that start before them
    are equal. A wrong match is a wrong answer, perhaps with another user's data: compare content, or use a hash that nobody
    can forge. Anything that a method raises ends the engine."""

    def match(self, request: PrefixRequest, recompute: int) -> PrefixHit:
        """The longest prefix of `request.token_ids` whose KV is kept in all groups. In a group with a window only the blocks are
        needed (and returned) that are still seen from position `w - recompute` on, where w is `tokens` rounded down to whole
        blocks: positions of the hit are computed again, and the kernel may do without the block that is used in part.
        Changes nothing but `memo`. Rate: request (each time it is tried, and for `RequestView.expected_hit`)."""

    def opened(self, slot: int, request: PrefixRequest, hit: int) -> None:
        """The request runs in `slot`, and its first `hit` positions have their KV: it will compute the rest, and `match` may name
        it as owner of that. Not called for requests that offer nothing. Rate: request."""

    def closed(self, slot: int) -> None:
        """It gave the slot up; nothing more is inserted from there. Its blocks are reported by `idle`. Rate: request."""

    def insert(
        self, slots: np.ndarray, columns: np.ndarray, ids: Sequence[np.ndarray], tokens: np.ndarray
    ) -> Sequence[np.ndarray]:
        """Blocks were filled and committed: ids[g][i] is the block of slot slots[i] in column columns[i] (int [n]; columns of a
        slot ascending, without gaps from its hit on). `tokens` int32 [slots, positions]: all tokens by slot, valid during
        the call. → per group bool [n]: which blocks the index keeps from now on. Rate: step, only when a block was filled."""

    def idle(self, group: int, ids: np.ndarray) -> None:
        """Nobody refers to these kept blocks any more; of one request, later columns first. Rate: step, when there are any."""

    def used(self, group: int, ids: np.ndarray) -> None:
        """These idle blocks were matched and are referred to again. Rate: request."""

    def evict(self, group: int, count: int) -> tuple[np.ndarray, Sequence[bytes]]:
        """Keep `count` of the idle blocks no longer: which (int [count], there are as many) and the key of each one's content.
        Rate: step, on shortage."""

    def keys(self, request: PrefixRequest) -> Sequence[bytes]:
        """The keys of a request's full blocks, in order. Equal keys mean equal content, in this and in any other process.
        Rate: request, only with a connector."""

    def restore(self, keys: Sequence[bytes], ids: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """Blocks ids[g][i] (int) hold the content keys[i] again → per group bool [n]: which are kept from now on. Rate: load."""

    def drop(self, group: int, ids: np.ndarray) -> None:
        """Their content is not to be trusted (a device lost or spoilt it): keep these kept blocks, idle or not, no longer.
        Rate: on such an event only."""

    def reset(self) -> None:
        """Keep nothing, and forget the open slots: nothing is inserted from them any more. Rate: rare."""

    def held(self, group: int) -> np.ndarray:
        """The blocks that are kept, int, any order: `check()` compares them with the pool. Rate: when idle."""


@runtime_checkable
class Connector(Protocol):
    """Keeps KV blocks that the pools have no room for, and brings them back. Engine part, host, one thread; its jobs are done by
    the plugin's worker part (`make_block_store`) on every rank, those of one plan in order and before that plan's forward."""

    name: str  # of the plugin whose worker part takes the jobs

    def evicted(self, group: int, ids: np.ndarray, keys: Sequence[bytes]) -> None:
        """These blocks (int [n]) of a group will be overwritten by the plan that is being made. Rate: step, on shortage."""

    def saves(self) -> Sequence[Job]:
        """Jobs that read what was evicted since the last call, for the plan that is being made. Rate: step."""

    def find(self, keys: Sequence[bytes]) -> int:
        """How many of these keys, from the first on, are stored for every group. Rate: request."""

    def load(self, keys: Sequence[bytes], ids: Sequence[np.ndarray]) -> Job:
        """A job that writes what is stored under keys[i] into block ids[g][i] of every group g. A failed one (Ack.error) costs
        time only: what its blocks hold is never used. Rate: request."""

    def done(self, ack: Ack) -> None:
        """One of its jobs was acknowledged. Rate: job."""

    # May also have `closing() -> bool`, rate once: the engine ends, and nothing runs any more. True: `evicted` then names all
    # blocks that the pools still keep, and the jobs that `saves` returns after it are done before the workers are closed.


@runtime_checkable
class Handle(Protocol):
    """One submitted step."""

    def result(self) -> StepResult:
        """Wait for it. Raises EngineDeadError when a worker is gone. Called once, in order of submission."""


@runtime_checkable
class Executor(Protocol):
    """Runs plans on one or more ranks. Engine part. `start` → `allocate` → many `submit` → `close`."""

    def start(self) -> WorkerReport:
        """Open devices, build the model, load weights, measure memory. Rate: build. Raises CapacityError, PluginError."""

    def allocate(self, allocation: Allocation) -> None:
        """Allocate KV and slots on every rank. Rate: build."""

    def submit(self, plan: StepPlan) -> Handle:
        """Start a step and return at once where the device can; plans run in order. Rate: step."""

    def call(self, method: str, payload: bytes) -> list[bytes]:
        """Run the registered call "plugin.name" on every rank between steps; one answer a rank. Rate: rare."""

    def close(self) -> None:
        """Stop every rank; idempotent; never hangs longer than its own stated limit."""


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
    flags: int = 0  # of `kernel_core.plan`, joined with "or"


@runtime_checkable
class RequestPreparer(Protocol):
    """Face part. Returned by `prepare_request`."""

    def prepare(self, request: Prepared) -> None:
        """Read `request.fields`, add payloads, spans, identity, jobs, gates, resources. Raise RequestError (it becomes a
        400 for that request only). Rate: request."""


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
    preemptions: int = 0  # since the start


@dataclass(frozen=True, slots=True)
class Arrival:
    """A sequence that the engine took. `family`: the user request's id where it has several (n > 1). `at`: monotonic clock."""

    id: str
    family: str | None
    num_prompt: int
    max_tokens: int
    priority: int
    at: float


@runtime_checkable
class Observer(Protocol):
    """Read-only; may not raise into the loop (an error disables it and is reported once)."""

    def added(self, arrival: Arrival) -> None:
        """Rate: request."""

    def step(self, record: StepRecord) -> None:
        """Rate: step, after commit."""

    def finished(self, request_id: str, reason: str, num_prompt: int, num_output: int) -> None:
        """Rate: request."""


@runtime_checkable
class TextCodec(Protocol):
    """Service "text/1": tokens to text and back. Face part."""

    eos_ids: frozenset[int]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...
    def token(self, token_id: int) -> str: ...
    def token_bytes(self, token_id: int) -> bytes:
        """What the token stands for in a text, which may be a part of a character. Rate: token of requests with logprobs."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> list[int]:
        """Messages to prompt token ids; options: tools, template, add_generation_prompt, template_args."""

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> TextStream:
        """Start the incremental text of one completion."""


@runtime_checkable
class TextStream(Protocol):
    """Incremental text of one completion."""

    def push(self, token_ids: Sequence[int]) -> tuple[str, str | None, int]:
        """Feed new tokens, get (text that is final, matched stop string or None, how many of these tokens count).
        Half characters and possible beginnings of stop strings are held back."""

    def flush(self) -> str:
        """What was held back, at the end of a completion that no stop string ended."""


@runtime_checkable
class CheckpointFormat(Protocol):
    """Returned by `make_checkpoint`; reads one format. Face (`inspect`) and worker (`tensors`)."""

    format: str

    def recognises(self, path: str) -> bool: ...
    def inspect(self, path: str) -> Any:
        """→ ModelInfo, without reading weights. Rate: build."""

    def tensors(self, path: str) -> Any:
        """→ iterator of (name, torch tensor) in file order, memory-mapped where the format allows. Rate: build, reload."""


Call = Callable[[bytes], bytes]
Verb = Callable[..., Any]
