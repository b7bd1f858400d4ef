# pyright: reportReturnType=false
# Docstrings are the bodies here.
"""The worker-side contract: what models, devices, attention backends, transforms and drafters see and promise.

Letters: R rows, T tokens of the step, N logits rows, m draft positions a row, S slots, V vocabulary, H hidden size.
Rates: *build*, *step* (once per step, outside the graph), *graph* (inside the compiled graph: torch, functional, static
shapes, no `.item()`). Methods are *device* (torch tensors) unless declared *host* (numpy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from kernel_core.config import KernelConfig
from kernel_core.contexts import BuildContext, ModelInfo
from kernel_core.manifest import ModelFamily
from kernel_core.nn.draft_length import DraftLength
from kernel_core.nn.transfer import Download
from kernel_core.plan import Allocation, Capabilities, Opened, StepPlan, StepResult, WorkerReport

# ---- attention and KV --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one attention layer declares. Same (kind, window) and block size → same KV group.

    `kind`: "full" or "window" (later "latent", "cross", "recurrent"). `window` w: position p sees p-w+1 .. p,
    and where `causal` is false also up to p+w-1. Slots below `first_slot` are never read: they may hold anything.
    `algorithm` lets a layer ask for a special backend ("softmax" by default). `sinks`: an extra logit a head."""

    layer: str  # unique path, the key of its KV
    num_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    kind: str = "full"
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    causal: bool = True
    algorithm: str = "softmax"
    first_slot: int = 0


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """One group's part of a step, on the device; input of `AttentionBackend.plan`.

    Query token j of row r is q_start[r] + j and sits at position kv_len[r] - q_len[r] + j (counts are the true ones).
    `slot_mapping` [T] int64 is where each token's KV goes (block * block_size + offset), -1: not written.
    `tree` [T, W] bool or None: for rows with tree drafts, which of the row's own step tokens (by index in the row) a token
    sees; None: causal. `max_q`, `max_kv` are host ints (upper bounds) for launch sizes. `fresh`: no row has KV from earlier
    steps, so that q, k and v of the step are all there is."""

    q_start: Tensor  # [R + 1] int32
    kv_len: Tensor  # [R] int32, this step's tokens included
    block_table: Tensor  # [R, B] int32
    slot_mapping: Tensor  # [T] int64
    block_size: int
    max_q: int
    max_kv: int
    tree: Tensor | None = None
    positions: Tensor | None = None  # [T] int64 of the queries where trees make them differ from the above; for windows
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class HeadPreparation:
    """What happens to q and k between their projection and the attention: where there are weights, an RMS norm per head
    (`offset` as in the op `rms_norm`), then the op `rotary`."""

    cos: Tensor  # [P, rot / 2] float32
    sin: Tensor
    positions: Tensor  # [T] int64
    interleaved: bool
    q_weight: Tensor | None = None  # [D]
    k_weight: Tensor | None = None
    eps: float = 0.0
    offset: int = 0


@runtime_checkable
class AttentionBackend(Protocol):
    """KV storage of a layer in the device's own layout, and attention over it. Never reads a block that a row's table does
    not name below its length; never writes a slot that is not in `slot_mapping`."""

    name: str  # "vendor:name"
    priority: int

    def supports(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> bool:
        """Rate: build."""

    def bytes_per_block(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int) -> int:
        """Rate: build. Exact."""

    def allocate(self, spec: AttentionSpec, dtype: torch.dtype, block_size: int, num_blocks: int) -> Any:
        """One layer's KV storage, opaque to everybody else. Rate: build."""

    def plan(self, batch: AttentionBatch, specs: Sequence[AttentionSpec]) -> Any:
        """What all layers of a group share in this step. Rate: step."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, kv: Any, plan: Any, spec: AttentionSpec, sinks: Tensor | None) -> Tensor:
        """Write k, v [T, Hkv, D] at the planned slots, then attend q [T, Hq, D] → [T, Hq, Dv]. Rate: graph, per layer."""

    def copy_kv(self, kv: Any, spec: AttentionSpec, src: Tensor, dst: Tensor) -> None:
        """Copy single tokens between slots (int64 [n]) of one layer, as if all were read before any is written. Entries
        0 → 0 are padding. Rate: step."""

    # May also have `prepared_forward(q, k, v, kv, plan, spec, sinks, heads: HeadPreparation)`, rate graph: `forward` of q and
    # k that it normalises and rotates itself; it may write into q, k and v. Layers use it where there is one.
    # May also have `blocks(kv, spec, block_size) -> Sequence[Tensor]`, rate build: the tensors that hold one layer's KV, each
    # with the block as its first dimension and a block's part contiguous. Without it KV blocks cannot leave the device.


class BlockAccess(Protocol):
    """Whole KV blocks of a group, all its layers together, as bytes. For a connector's worker part, in the worker's thread,
    between two steps. A block may be written while nothing but its job knows it."""

    device: torch.device  # where the blocks are
    bytes_per_block: Sequence[int]  # per group
    layout: str  # what these bytes mean: equal between two workers that understand each other's

    def read(self, group: int, ids: Sequence[int]) -> Download:
        """→ "blocks" uint8 [n, bytes_per_block] on its way to the host: what the blocks hold after the steps before."""

    def write(self, group: int, ids: Sequence[int], data: Tensor) -> None:
        """uint8 [n, bytes_per_block] on the host, as `read` gave it. From pinned memory the host does not wait for the copy."""


@runtime_checkable
class LongJob(Protocol):
    """A job that goes on while steps run."""

    def done(self, wait: float) -> bool:
        """Has it ended, or does it within `wait` seconds? Rate: step."""

    def finish(self) -> None:
        """Called once when it has ended, between two steps. What it raises is the error of its ack."""


class BlockStore(Protocol):
    """The worker part of a connector. `close()`, where there is one, is called at the end."""

    def job(self, data: bytes) -> LongJob | None:
        """Do a job of the connector before the forward of the plan it came with, or begin it. What it raises is the ack's
        error."""


# ---- model -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Forward:
    """The explicit argument of a model's forward; there is no global context. A pytree of tensors.

    `kv` by layer path, `attention` (the backends' plans) by layer path, `inputs` the named step inputs,
    `taps` is filled by the model with hidden states at the tap points that were asked for at build, unless `tapped` says that
    nobody reads them in this step (the drafter sleeps)."""

    token_ids: Tensor  # [T] int64
    positions: Tensor  # [T] int64, or [A, T] where an owner of positions declares axes
    kv: Mapping[str, Any] = field(default_factory=dict)
    attention: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    embeds: Tensor | None = None  # [T, H] span embeddings
    embeds_mask: Tensor | None = None  # [T] bool
    taps: dict[str, Tensor] = field(default_factory=dict)
    tapped: bool = True
    read: Tensor | None = None  # [N] int64 tokens: a model may return the states [N, H] of these alone


@dataclass(frozen=True, slots=True)
class WorkerContext(BuildContext):
    """Given to the worker-side hooks. `dtype` is the compute dtype; sizes are the ones that were settled. `find`: a directory,
    hub id or embedded name → its ModelInfo, weights not read; raises ConfigError. `ops` is complete after `register_ops`."""

    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    vocab_size: int
    max_slots: int
    max_model_len: int
    max_tokens_per_step: int
    find: Callable[[str], ModelInfo]
    ops: OpRegistry


@dataclass(frozen=True, slots=True)
class ModelContext:
    """Given to a family's `build`. `ops` resolves semantic ops; `attention(spec)` gives the backend of a layer."""

    info: ModelInfo
    config: KernelConfig
    dtype: torch.dtype
    device: torch.device
    ops: OpRegistry
    attention: Callable[[AttentionSpec], AttentionBackend]
    rank: int = 0
    world_size: int = 1
    taps: tuple[str, ...] = ()


class Model(Protocol):
    """An nn.Module built on the meta device by a family. Attention layers are found by their `spec` attribute."""

    tap_points: Mapping[str, str]  # name → what it is

    def forward(self, fwd: Forward) -> Tensor:
        """→ hidden states [T, H] after the final norm. Rate: graph."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, H] → [N, V], in the model's dtype. Rate: graph."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] → [T, H], scaled as the model does."""


# ---- ops ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class OpRegistry(Protocol):
    """Semantic ops: a torch reference each, and what devices registered. The choice is made once per call site, at build."""

    def register(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        owner: str,
        priority: int = 0,
        predicate: Callable[[Mapping[str, Any]], bool] | None = None,
    ) -> None:
        """Offer an implementation. `predicate` sees the static facts of the call site (dtype, sizes, weight format)."""

    def resolve(self, name: str, **facts: Any) -> Callable[..., Any]:
        """The implementation for a call site. Raises PluginError when nothing, not even a reference, fits."""

    def explain(self) -> Sequence[tuple[str, str, str]]:
        """(op, chosen owner, facts) of every choice made so far, for `kernel plugins --explain ops`."""


@runtime_checkable
class WeightFormat(Protocol):
    """How a linear keeps its weight. Applied to every parallel linear while the model is on the meta device."""

    format: str  # "int8", ...

    def replace(self, path: str, linear: nn.Module) -> nn.Module | None:
        """Return the module that takes its place, or None. It must offer `load(part, tensor)` and `finish()`."""


# ---- the runner's views ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class StepView:
    """Device tensors of the current step, valid until it ends. Read-only for plugins.

    Logits rows are the positions that are sampled: per row with room > 0, its last known token and its drafts.
    `history` is the token table itself: tokens of slot s are history[s, :known[s]]."""

    rows: Tensor  # [R] int64 slots
    lens: Tensor  # [R] int32 KV length after this step's tokens
    next_token: Tensor  # [R] int64, last known token
    token_ids: Tensor  # [T] int64
    positions: Tensor  # [A, T] int64
    q_start: Tensor  # [R + 1] int32
    slot: Tensor  # [N] int64 slot of each logits row
    row: Tensor  # [N] int64 index into rows
    draft_pos: Tensor  # [N] int32: 0 after the last known token, j after draft j
    position: Tensor  # [N] int64: position of the token that this logits row decides
    ancestors: Tensor  # [N, m] int32: the drafts before it on its path (index into drafts), -1 padded
    drafts: Tensor  # [R, m] int64, -1 absent
    history: Tensor  # [S, L] int32 token table
    known: Tensor  # [S] int32
    num_prompt: Tensor  # [S] int32
    host_slot: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # [N] `slot` on the host
    max_len: int = 0  # host upper bound of `lens`, and of `known` of the rows


@dataclass(slots=True)
class HostTurn:
    """For transforms declared host, once per step while the forward runs. Numpy.

    `mask[i]` are the rows u32 [1 + m, ceil(V / 32)] of watched slot i, all ones by default: bit t of row j allows token t
    after draft j. A filled mask is applied by the kernel before the mask stage."""

    slots: np.ndarray  # [W] watched slots of this step
    tokens: Sequence[np.ndarray]  # per slot, the tokens it gained in the last step
    drafts: np.ndarray  # [W, m] -1 absent
    parents: np.ndarray  # [W, m] draft index each one continues, -1: the last token
    mask: np.ndarray  # [W, 1 + m, ceil(V / 32)] uint32
    failed: dict[int, str] = field(default_factory=dict)  # slot → why its request ends with an error; its mask does not matter


@runtime_checkable
class LogitsTransform(Protocol):
    """One stage's change to logits. Batched over all logits rows; slots it does not watch cost nothing."""

    stage: Literal["mask", "bias", "penalty", "temperature"]
    host: bool  # True: `fill` is called in the host turn and `apply` never
    argmax_invariant: bool  # True: greedy rows are unchanged, so it may be skipped for them

    def opened(self, opened: Opened) -> bool:
        """A slot opens; its payload for this plugin is in `opened.payloads`. True: watch the slot. Rate: request."""

    def closed(self, slot: int) -> None:
        """Rate: request; only for watched slots."""

    def apply(self, logits: Tensor, step: StepView) -> Tensor:
        """[N, V] float32 → the same shape; may write in place. Rows of slots it does not watch must stay as they are."""

    def fill(self, turn: HostTurn) -> None:
        """Host transforms only. Rate: step."""


@runtime_checkable
class StepInputs(Protocol):
    """Named device inputs, filled once per step, read by models and wrapped modules from `Forward.inputs`."""

    names: Mapping[str, tuple[torch.dtype, str, Any]]  # name → (dtype, "tokens"|"rows"|"slots", pad value)

    def opened(self, opened: Opened) -> None: ...
    def closed(self, slot: int) -> None: ...
    def fill(self, step: StepView) -> Mapping[str, Tensor]:
        """Rate: step."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a drafter with layers of its own is built from, once the target model is loaded.

    `info` describes the target's checkpoint; `context` is what families build with (ops, attention, dtype, device), `info`
    of it the target's. `embed` [..] → [.., H] and `logits` [N, H] → [N, V] are the target's own, weights shared."""

    info: ModelInfo
    context: ModelContext
    embed: Callable[[Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    find: Callable[[str], ModelInfo]
    """Directory, hub id or embedded name → its ModelInfo. Raises ConfigError."""
    load: Callable[[ModelInfo, ModelFamily | None], nn.Module]
    """Build and load a checkpoint with a family (None: by its architecture), weight formats included, wrappers not. Its
    attention layers get KV of their own. Raises ConfigError."""
    graphs: Callable[[nn.Module], Callable[..., Any]] = lambda module: module
    """The runner part of that name for a module of the drafter's: to be called instead of it, faster where the device can."""


@dataclass(slots=True)
class DraftBatch:
    """One pass of a drafter's own layers, N tokens. `forward` is the module's argument: token ids, positions (logical, of
    each token), KV, attention plans of the drafter's layers. `row` [N] is the row of each token, `last` [R] the index of each
    row's last token that counts. `source` [N] is the index into the step's T tokens of the target state at the position
    before the token (a row's first token may have none: its own index then; its KV slot is never read, see `first_slot`)."""

    forward: Forward
    row: Tensor
    last: Tensor
    source: Tensor


@dataclass(slots=True)
class DraftView:
    """What a drafter sees after verification. T tokens of the step, R rows, `known` [R] counts after it.

    `hidden` [T, H] are the target's final states, `taps` [T, H] the states the drafter declared, `path` [R, 1 + m] the
    indices into T of the row's last known token and its accepted drafts in order, padded with the last of them."""

    step: StepView
    accepted: Tensor  # [R] int32 accepted drafts; the row's new last token is history[slot, known - 1]
    last_token: Tensor  # [R] int64
    hidden: Tensor  # [T, H]
    taps: Mapping[str, Tensor]
    wanted: Tensor  # [R] int32 how many drafts the next plan has room for; 0: nothing is sampled for the row yet
    known: Tensor  # [R] int32 tokens known after the step
    path: Tensor  # [R, 1 + m] int64
    host_slots: np.ndarray  # [R] the rows' slots on the host
    host_sampled: np.ndarray  # [R] bool: which rows sampled
    host_most: np.ndarray  # [R] most drafts that the row's request wants; 0 also where nothing was sampled
    passes: DraftPasses | None = None  # for drafters with layers of their own


class DraftPasses(Protocol):
    """Makes the batches for passes of a drafter's own layers: KV goes to the row's own blocks, shared and missing ones are
    never written. All functional, device. `DraftView.passes`."""

    def catch_up(self, shift: int) -> DraftBatch:
        """The pass over what the step computed, in which no KV is left out. shift 1: for every step token that counts, the
        token after it (layers that store (state i - 1, token i) in slot i, first_slot = 1). shift 0: those tokens themselves
        and the one after the last (layers of an ordinary model). Rejected and absent drafts write nothing."""

    def advance(self, tokens: Tensor, number: int) -> DraftBatch:
        """One token a row [R]: draft `number` (0, 1, ...) of a chain, after those before it. `source` is empty."""

    def expand(self, tokens: Tensor, parents: Tensor) -> DraftBatch:
        """All n nodes of a tree at once, [R, n] tokens (-1 absent) and parents (index of an earlier node, -1: the last known
        token), each seeing the known tokens and its own path. Flat order row by row. `source` is empty."""

    def draw(self, logits: Tensor, number: int | Tensor) -> Tensor:
        """Logits [R, V] → tokens [R] int64: what each row's own draw (temperature and random function; greedy: argmax) takes
        for the token at draft place `number`, [R] or one for all. So that sampled requests agree with their drafts more often."""


@runtime_checkable
class Drafter(Protocol):
    """Proposes drafts; may change speed, never output. Called on every step, also when nobody wants drafts.

    How many drafts it returns for a row decides how many the next plan makes room for: returning none turns drafting off for
    that row, at no cost, until it returns some again. `length` decides that from what was measured: the runner tells it of slots
    and steps, and does not call `propose` in steps for which `asks` says no."""

    width: int  # most drafts a row
    taps: tuple[str, ...]
    lookback: (
        int  # target states needed before the first new token; after a prefix hit that many tokens are computed again. 0: it
    )
    # reads none at all, and `DraftView.hidden` may have few of them
    needs_host: bool
    tree: bool  # False: parents are always the chain's (j - 1)
    length: DraftLength | None  # None: as many as it likes

    def opened(self, opened: Opened) -> None: ...
    def closed(self, slot: int) -> None: ...
    def propose(self, view: DraftView) -> tuple[Tensor, Tensor, Tensor]:
        """→ tokens [R, m] int64 (-1 absent), parent [R, m] int32 (-1: the last token; chain: j - 1; always
        smaller than j), count [R] int32."""


@runtime_checkable
class LayeredDrafter(Drafter, Protocol):
    """A drafter with layers of its own: their attention joins the target's KV groups of the same kind and window, so that a
    prefix hit covers both; what a layer stores at slot i may depend on tokens up to i only."""

    ahead: int  # KV positions beyond those of the plan that its passes write in the same step (chain of m: m; n nodes: n + 1)

    def build(self, target: Target) -> nn.Module:
        """Build and load the layers, on the target's device. Rate: build, once, after the target is loaded and before memory is
        measured. Raises ConfigError when head and target do not fit."""


@runtime_checkable
class StepProbe(Protocol):
    """Measures steps on one rank. It is told of steps while it is in the list that `watch_steps` was given; one that raises is
    reported and taken out."""

    def begin(self, plan: StepPlan) -> None:
        """A step is about to be submitted. Rate: step."""

    def end(self, plan: StepPlan, started: float, timings: Mapping[str, float]) -> None:
        """It is submitted. `started`: `perf_counter()` where its first phase began, `timings`: host seconds of its phases,
        one after the other in this order, and "total". Rate: step."""


# ---- device ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes of the device's memory: all of it, and what is free for this process now. `kv_limit`: the most that KV may take
    when the user asked for no size (a device whose memory other programs share sets it); None: no limit."""

    total: int
    free: int
    kv_limit: int | None = None


@runtime_checkable
class Device(Protocol):
    """One opened device of one rank. Returned by `make_device`; ops and attention come by their own hooks from the same
    plugin. Every method but `synchronize` is called at build."""

    name: str
    torch_device: torch.device

    def capabilities(self) -> Capabilities: ...
    def memory(self) -> MemoryReport: ...
    def runner_parts(self) -> Mapping[str, Callable[..., Any]]:
        """Factories that replace runner parts by name ("sampler", "step_inputs", "graphs", ...: `nn/runner.py`), or none."""

    def synchronize(self) -> None:
        """Wait for everything submitted. Rate: step at most."""

    def close(self) -> None: ...


@runtime_checkable
class MeasuringDevice(Device, Protocol):
    """A device that measures what a step takes. Others get an estimate."""

    def peak_memory(self, make_runner: Callable[[], Any], sizes: Allocation) -> int:
        """→ bytes to keep beside weights and KV: the most that a step takes while it runs, slots included, and what the device
        keeps for itself, such as graphs. `make_runner()` gives a new runner of these sizes, with KV for two blocks a group; the
        device calls its `submit` with what its largest step is. Rate: build, before `memory()` is asked; not called when the
        user sets the size of KV. Raises CapacityError when such a step does not fit."""


@runtime_checkable
class Rank(Protocol):
    """The worker of one rank, as executors drive it: `start` → `allocate` → many `run` → `close`, by one thread."""

    def start(self) -> WorkerReport: ...
    def allocate(self, allocation: Allocation) -> None: ...
    def run(self, plan: StepPlan) -> StepResult: ...
    def call(self, method: str, payload: bytes) -> bytes: ...
    def close(self) -> None: ...


Weights = Iterator[tuple[str, Tensor]]
