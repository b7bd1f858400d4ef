"""The engine: requests in, outputs out, one step at a time. `LLM` and `AsyncEngine` drive it; so may you.

engine = Engine(model="tiny-chat")
engine.add_request("a", "Hello", SamplingParams(max_tokens=8))
while engine.has_unfinished_requests():
    for output in engine.step(): ...
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernel_core import sizes
from kernel_core.config import EngineConfig, KernelConfig
from kernel_core.errors import ConfigError, EngineDeadError, RequestError
from kernel_core.intake import Accepted, Intake, Prompt
from kernel_core.loop import OverlappedLoop, PlainLoop
from kernel_core.outputs import Outputs, Tracked
from kernel_core.plan import Allocation, WorkerReport
from kernel_core.policy import combined
from kernel_core.protocols import Call, Connector, Executor, Observer, Policy, PrefixIndex, Resource, TextCodec, Verb
from kernel_core.request import Request, RequestOutput, SamplingParams, Updates
from kernel_core.scheduler import Scheduler

logger = logging.getLogger("kernel_core")
REST_STEPS = 1000  # steps that an engine without requests may still take before it is called stuck


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What plugins made for the engine part."""

    policies: tuple[tuple[str, Policy], ...] = ()  # with the plugins' names
    resources: tuple[Resource, ...] = ()
    observers: tuple[Observer, ...] = ()
    prefix_index: PrefixIndex | None = None
    connector: Connector | None = None
    calls: Mapping[str, Call] = field(default_factory=dict)  # by "plugin.name"


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What a face must know of a started engine, perhaps one in another process."""

    max_model_len: int
    vocab_size: int
    has_policy: bool
    summary: str = ""
    start_seconds: float = 0.0


class EngineCore:
    """Executor, sizes, scheduler and loop of one engine. `parts` is called when the sizes are settled; `emit` gets every
    `Updates`. Raises CapacityError when one request of the asked length does not fit."""

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        emit: Callable[[Updates], None],
        parts: Callable[[WorkerReport, Allocation], EngineParts] = lambda report, allocation: EngineParts(),
    ) -> None:
        self.config, self.executor, self._closed = config, executor, False
        try:
            self._start(emit, parts)
        except BaseException:
            executor.close()
            raise

    def _start(self, emit: Callable[[Updates], None], parts: Callable[[WorkerReport, Allocation], EngineParts]) -> None:
        config, executor = self.config, self.executor
        self.report = executor.start()
        depth = choose_depth(config, self.report)
        self.allocation = sizes.settle(config, self.report, depth)
        executor.allocate(self.allocation)
        made = parts(self.report, self.allocation)
        self.has_policy, self.calls = bool(made.policies), made.calls
        self.scheduler = Scheduler(
            *(config, self.report.groups, self.allocation, self.report.capabilities),
            *(combined(made.policies), made.resources, depth),
            policy_plugin=made.policies[0][0] if made.policies else None,
            prefix_index=made.prefix_index,
            connector=made.connector,
        )
        self.loop: PlainLoop | OverlappedLoop
        if depth == 1:
            self.loop = PlainLoop(self.scheduler, executor, emit, made.observers)
        else:
            self.loop = OverlappedLoop(self.scheduler, executor, emit, made.observers, depth)

    def facts(self, summary: str = "", start_seconds: float = 0.0) -> EngineFacts:
        return EngineFacts(self.allocation.max_model_len, self.report.vocab_size, self.has_policy, summary, start_seconds)

    def add(self, request: Request) -> None:
        """Raises RequestError when it can never run."""
        self.scheduler.add(request)
        self.loop.outlet.added(request)

    def call(self, method: str, payload: bytes = b"") -> list[bytes]:
        """A registered call of the engine part, or on every rank between two steps."""
        own = self.calls.get(method)
        if own is not None:
            return [own(payload)]
        self.loop.drain()
        return self.executor.call(method, payload)

    def close(self) -> None:
        """Let a connector store what it keeps for later engines, then stop the workers; idempotent."""
        closed, self._closed = self._closed, True
        try:
            if not closed and self.scheduler.has_connector and self.loop.outlet.dead is None:
                self.loop.drain()
                self.scheduler.closing()
                while self.scheduler.plannable():
                    self.loop.step()
        except EngineDeadError as error:
            logger.warning("the engine ended before all KV was stored: %s", error)
        finally:
            self.executor.close()


def choose_depth(config: EngineConfig, report: WorkerReport) -> int:
    """How many plans may be in flight: 1, the plain loop; 2, the overlapped one."""
    if config.overlap is True and report.drafter_needs_host:
        raise ConfigError(
            'engine.overlap = true: the drafter needs the tokens of each step on the host first; set overlap to "auto" or false'
        )
    wanted = report.capabilities.async_submit if config.overlap == "auto" else config.overlap
    return 2 if wanted and not report.drafter_needs_host else 1


@dataclass(slots=True)
class Assembly:
    """A started engine in pieces. `core` is given the consumer of updates; `close` undoes all but the core."""

    core: Callable[[Callable[[Updates], None]], EngineCore]
    intake: Callable[[EngineCore], Intake]
    codec: TextCodec | None
    name: str = ""
    device: str = ""
    close: Callable[[], None] = lambda: None
    verbs: Mapping[str, Verb] = field(default_factory=dict)
    service: Callable[..., Any] | None = None  # (name, Protocol or None) → a service of the face


class Engine:
    """One engine with its face, driven by one thread.

    Made from a `KernelConfig` or from its keys as keywords; keys of `[engine]` may be given directly:
    `Engine(model="tiny-chat", max_model_len=512, plugins={"priority": {}})`. `enable` names further plugins. Raises ConfigError,
    PluginError, CapacityError. When a worker dies, every request ends with an error, and afterwards every call raises
    EngineDeadError."""

    def __init__(
        self,
        config: KernelConfig | Mapping[str, Any] | None = None,
        *,
        enable: Sequence[str] = (),
        assembly: Assembly | None = None,
        **keys: Any,
    ) -> None:
        started = time.monotonic()
        self._made = assembly or _assemble(config, keys, enable)
        self.codec = self._made.codec
        self.outputs = Outputs(self.codec)
        self._changed: dict[Tracked, None] = {}
        self._aborts: list[str] = []
        self._dead: str | None = None
        try:
            self.core = self._made.core(self._emit)
        except BaseException:
            self._made.close()
            raise
        self.intake = self._made.intake(self.core)
        self.start_seconds = time.monotonic() - started
        core = self.core
        self.summary = sizes.summary(self._made.name, self._made.device, core.report, core.allocation, self.start_seconds)

    @property
    def dead(self) -> str | None:
        """Why the engine takes nothing any more, or None."""
        return self._dead

    @property
    def max_model_len(self) -> int:
        return self.core.allocation.max_model_len

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without parameters gets: the kernel's defaults and the model's generation_config.json."""
        return self.intake.params()

    # ---- requests

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None) -> None:
        """Raises RequestError for an invalid request, of which nothing remains."""
        self.add(self.intake.accept(request_id, prompt, params))

    def add(self, accepted: Accepted) -> None:
        """Hand over what `intake.accept` made, perhaps in another thread."""
        self._require_life()
        if accepted.request_id in self.outputs:
            raise RequestError(f"a request with the id {accepted.request_id!r} is running already; choose another id")
        added: list[str] = []
        try:
            for request in accepted.requests:
                self.core.add(request)
                added.append(request.id)
        except RequestError:
            self._abort(added)
            raise
        self.outputs.add(accepted)

    def abort(self, request_ids: str | Sequence[str]) -> None:
        """End requests, whatever they are doing; unknown ids are ignored. Their last output comes with the next `step`."""
        self._abort(self.outputs.core_ids([request_ids] if isinstance(request_ids, str) else request_ids))

    def _abort(self, core_ids: Sequence[str]) -> None:
        if core_ids and self._dead is None:
            self.core.scheduler.abort(core_ids)
            self._emit(self.core.scheduler.updates())  # now: the ids may be used again at once

    def has_unfinished_requests(self) -> bool:
        return bool(len(self.outputs) or self._changed)

    # ---- steps

    def step(self) -> list[RequestOutput]:
        """Run one step. → the requests that changed, each with everything so far."""
        return [tracked.snapshot() for tracked in self.advance()]

    def advance(self) -> list[Tracked]:
        """As `step`, without copying what is still running."""
        self._require_life()
        try:
            worked = self._step()
        except EngineDeadError as error:
            self.fail(str(error))
            if not self._changed:
                raise
            worked = True
        if not worked and len(self.outputs):
            time.sleep(0.001)  # everybody waits at a gate
        changed, self._changed = list(self._changed), {}
        return changed

    def _step(self) -> bool:
        worked = self.core.loop.step()
        aborts, self._aborts = self._aborts, []
        self._abort(aborts)
        if not len(self.outputs):
            self._rest()
        return worked

    def _rest(self) -> None:
        """Nobody waits for output: finish what is in flight, so that the loop checks its counts and nothing runs."""
        for _ in range(REST_STEPS):
            if not self.core.loop.step():
                return

    def _emit(self, updates: Updates) -> None:
        changed, aborts = self.outputs.apply(updates)
        self._changed.update(dict.fromkeys(changed))
        self._aborts += aborts

    # ---- ends

    def _require_life(self) -> None:
        if self._dead is not None:
            raise EngineDeadError(self._dead)

    def fail(self, reason: str) -> None:
        """Nothing goes on: every request ends with this error, which their last outputs carry."""
        self._dead = reason
        self._changed.update(dict.fromkeys(self.outputs.fail(reason)))

    def call(self, method: str, payload: bytes = b"") -> list[bytes]:
        """Run the registered call "plugin.name" in the engine part, or on every rank, between two steps."""
        self._require_life()
        return self.core.call(method, payload)

    @property
    def verbs(self) -> Mapping[str, Verb]:
        """What plugins add to `LLM`, by name."""
        return self._made.verbs

    def service(self, name: str, protocol: type | None = None) -> Any:
        """A service of the face, checked against what the caller uses of it. Raises ConfigError when nobody provides it."""
        if self._made.service is None:
            raise ConfigError(f"this engine has no plugins, so nobody provides the service {name!r}")
        return self._made.service(name, protocol)

    def reset_cache(self) -> None:
        """Forget the KV of earlier requests, between two steps. What runs now keeps its own, and offers none of it any more."""
        self._require_life()
        self.core.loop.drain()
        self.core.scheduler.reset_cache()

    def close(self) -> None:
        """Stop everything; idempotent."""
        if self._dead is None:
            self.fail("the engine is closed")
        self.core.close()
        self._made.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def find_verb(verbs: Mapping[str, Verb], name: str) -> Verb:
    """Raises AttributeError, which says that a plugin may be missing."""
    if name not in verbs:
        raise AttributeError(
            f"there is no method {name!r}; a plugin that offers it may have to be enabled (kernel plugins lists them)"
        )
    return verbs[name]


def _assemble(config: KernelConfig | Mapping[str, Any] | None, keys: Mapping[str, Any], enable: Sequence[str]) -> Assembly:
    from kernel_core.assembly import assemble

    return assemble(config, keys, enable)
