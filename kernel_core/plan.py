"""What crosses between the engine and its workers: `StepPlan` one way, `StepResult` the other.

Both are frozen, versioned and made of numbers, bytes and numpy arrays only, so that they are the same for an
in-process runner, a process per rank or a remote host (`kernel_core.wire` turns them into bytes without pickle).
Letters: R rows of a step, T planned tokens, N logits rows, m drafts, S slots. Arrays are int32 unless said.

A row is one request in one step. Per row the worker computes `q` tokens: first the known tokens that are not yet
computed, then `room - 1` draft positions. **Counts are upper bounds**: with several plans in flight the worker's own
count of a slot may be lower (a draft was rejected), never higher, and the worker's count is the one that is used.
Always: `known - computed == q - max(room - 1, 0)` for a row with `room > 0`, on both sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

PLAN_VERSION = 1

#: row flags
PROMPT_LOGPROBS = 1  # report logprobs of this chunk's prompt tokens
NO_PREFIX_WRITE = 2  # blocks of this row are never offered to a prefix index
NO_PREFIX_READ = 4  # nor does it take any from there

#: sentinel in drafts and token arrays
NO_TOKEN = -1

#: more drafts in a step than any drafter has
MOST_DRAFTS = 1 << 16

#: how `StepResult.logprobs` values are computed
LOGPROBS_MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")


def _empty() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """The kernel's own sampling numbers of one request; what plugins add travels in their payloads.

    temperature 0 means greedy. top_k 0, top_p 1 and min_p 0 mean off. `logprobs` is the number of alternatives to report
    for sampled tokens (-1: none, 0: only the sampled token), `prompt_logprobs` the same for prompt tokens. `max_drafts`: most
    drafts in a step.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    logprobs: int = -1
    prompt_logprobs: int = -1
    num_prompt_tokens: int = 0
    max_drafts: int = MOST_DRAFTS


@dataclass(frozen=True, slots=True)
class Opened:
    """A request takes a slot. `token_ids` are all tokens known so far (prompt and, after preemption, output),
    `computed` how many of them have their KV in the blocks already (a prefix hit), `key` the 64-bit key of its
    random draws, `payloads` what each plugin's face or engine part sends to its worker part."""

    slot: int
    request_id: str
    token_ids: np.ndarray
    computed: int
    key: int
    sampling: SamplingRow
    payloads: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BlockUpdate:
    """New entries of one group's block table: `table[slots[i], columns[i]] = ids[i]`."""

    slots: np.ndarray = field(default_factory=_empty)
    columns: np.ndarray = field(default_factory=_empty)
    ids: np.ndarray = field(default_factory=_empty)


@dataclass(frozen=True, slots=True)
class Copies:
    """Single-token KV copies in all layers of one group, done before the forward (slot = block * block_size + offset)."""

    src: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    dst: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class Span:
    """Positions [start, stop) whose input comes from a producer instead of the token table.

    `key` is part of the identity of every block from `start` on. `cost` counts against the encoder budget. An atomic span is
    never split over chunks. `axis` is "self" or "cross". `payload` is what the producer reads."""

    start: int
    stop: int
    key: bytes
    cost: int
    atomic: bool = False
    axis: str = "self"
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Job:
    """Work for a plugin's worker part on every rank, acknowledged under (plugin, key)."""

    plugin: str
    key: str
    data: bytes


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Written by the scheduler, read by all ranks; arrays are copies and never change afterwards."""

    plan_id: int
    rows: np.ndarray  # [R] slots, any order, each at most once
    start: np.ndarray  # [R] computed tokens before the step, upper bound
    q: np.ndarray  # [R] tokens to compute, draft positions included
    room: np.ndarray  # [R] how many tokens the row may add; 0: nothing is sampled
    write_from: np.ndarray  # [R] positions below it are recomputed with their KV write masked
    flags: np.ndarray  # [R]
    opened: tuple[Opened, ...] = ()
    closed: np.ndarray = field(default_factory=_empty)  # slots, handled before `opened`
    new_blocks: tuple[BlockUpdate, ...] = ()  # one per KV group
    copies: tuple[Copies, ...] = ()  # one per KV group, or empty
    encode: tuple[tuple[int, Span], ...] = ()  # (slot, span)
    jobs: tuple[Job, ...] = ()
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    version: int = PLAN_VERSION

    def only(self, kept: np.ndarray) -> StepPlan:
        """The same step with these of its rows, `kept` [R] bool."""
        names = ("rows", "start", "q", "room", "write_from", "flags")
        return replace(self, **{name: getattr(self, name)[kept] for name in names})


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Logprobs in columns. Entry i belongs to row `row[i]` of the plan and to position `position[i]` of its request;
    `token_ids[i]` and `values[i]` hold the chosen token first, then the alternatives, best first, padded with -1;
    `rank[i]` is the 1-based rank of the chosen token."""

    row: np.ndarray  # [P]
    position: np.ndarray  # [P]
    token_ids: np.ndarray  # [P, 1 + k]
    values: np.ndarray  # [P, 1 + k] float32
    rank: np.ndarray  # [P]


@dataclass(frozen=True, slots=True)
class Ack:
    """A worker part finished a job (`error` None) or failed it."""

    plugin: str
    key: str
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step did. Written by the sampling rank; the executor joins the acks of all ranks."""

    plan_id: int
    tokens: np.ndarray  # new tokens of all rows, flat
    offsets: np.ndarray  # [R + 1] row r added tokens[offsets[r]:offsets[r + 1]]
    computed: np.ndarray  # [R] true computed tokens after the step
    drafted: np.ndarray  # [R] drafts that were verified
    accepted: np.ndarray  # [R] of those, accepted
    drafts: np.ndarray  # [R] drafts waiting on the device for the next step
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    outputs: tuple[tuple[int, str, np.ndarray], ...] = ()  # (slot, name, array)
    acks: tuple[Ack, ...] = ()
    lost: tuple[tuple[int, int], ...] = ()  # (slot, good tokens): computed again from there or before
    oversized: bool = False  # the device had no memory for a step of this size: all its rows are lost
    failed: tuple[tuple[int, str], ...] = ()  # (slot, reason): ends that request only
    payloads: Mapping[str, bytes] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)  # seconds
    version: int = PLAN_VERSION

    def spread(self, plan: StepPlan, kept: np.ndarray, oversized: bool) -> StepResult:
        """The result of `plan`, of which only the rows `kept` [R] bool were computed, by this result: the others are lost,
        their KV from before the step is not."""
        place = np.flatnonzero(kept).astype(np.int32)

        def full(values: np.ndarray) -> np.ndarray:
            out = np.zeros(kept.size, np.int32)
            out[place] = values
            return out

        def moved(logprobs: Logprobs | None) -> Logprobs | None:
            return None if logprobs is None else replace(logprobs, row=place[logprobs.row])

        counts = ("computed", "drafted", "accepted", "drafts")
        return replace(
            self,
            offsets=np.concatenate([[0], np.cumsum(full(np.diff(self.offsets)))]).astype(np.int32),
            **{name: full(getattr(self, name)) for name in counts},
            logprobs=moved(self.logprobs),
            prompt_logprobs=moved(self.prompt_logprobs),
            lost=(*self.lost, *zip(plan.rows[~kept].tolist(), plan.start[~kept].tolist())),
            oversized=oversized,
        )


# ---- what an executor reports before the first step -------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KVGroup:
    """Layers whose blocks live and die together. `bytes_per_block` sums all its layers on one rank."""

    kind: str  # "full", "window" (later: "latent", "cross", "recurrent")
    block_size: int
    bytes_per_block: int
    layers: tuple[str, ...]
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a device can do, as data; the scheduler and the resolver obey it and ask no device its name."""

    dtypes: tuple[str, ...] = ("float32",)
    block_sizes: tuple[int, ...] = (16,)  # preferred first; 0 = one block holds a whole request
    attention_kinds: tuple[str, ...] = ("full", "window")
    static_shapes: bool = False
    token_buckets: tuple[int, ...] = ()
    row_buckets: tuple[int, ...] = ()
    mixed_lengths: bool = True  # rows of different q in one step
    max_long_rows: int | None = None  # rows with q > 1 in one step
    query_lengths: tuple[int, ...] | None = None  # allowed q, None: any
    tokens_per_launch: int = 1
    graph_mode: str = "none"
    same_step_reads: bool = False
    tree_attention: bool = True
    async_submit: bool = False
    collectives: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """Sent by the executor after the weights are loaded, before KV is allocated.

    `kv_budget_bytes` is what one rank may spend on KV; `draft_width` the most drafts a row may carry, `draft_ahead` how many
    positions beyond those of a plan the drafter's own layers write, `lookback` how many positions of a prefix hit it needs
    computed again; `memory` states the split in bytes (weights, activations, KV budget, ...); `timings` the seconds of each
    start phase."""

    groups: tuple[KVGroup, ...]
    kv_budget_bytes: int
    capabilities: Capabilities
    vocab_size: int
    max_model_len: int  # what the model was made for
    draft_width: int = 0
    draft_ahead: int = 0
    lookback: int = 0
    drafter_needs_host: bool = False
    memory: Mapping[str, int] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Allocation:
    """The kernel's answer to `WorkerReport`: how much each rank allocates."""

    num_blocks: tuple[int, ...]  # per group; block 0 of each group is the null block and never handed out
    max_slots: int
    max_model_len: int
    max_tokens_per_step: int
    draft_width: int = 0
    draft_ahead: int = 0
    lookback: int = 0
