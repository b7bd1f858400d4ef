"""From what a worker reports to what it allocates: how long a request may be, and how many KV blocks each group gets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from kernel_core.config import EngineConfig
from kernel_core.errors import CapacityError
from kernel_core.plan import Allocation, KVGroup, WorkerReport

LEAST = 16  # tokens that a request must be able to have, or starting makes no sense


@dataclass(frozen=True, slots=True)
class Need:
    """What requests of a given length occupy, what their drafter writes ahead included. `chunk`, `decode`: most positions that a
    row computes at once, while its prompt is computed and after it. `depth`: plans in flight. `lookback`: positions that a
    window keeps longer."""

    groups: Sequence[KVGroup]
    max_len: int
    slots: int
    chunk: int
    decode: int
    depth: int
    ahead: int
    lookback: int

    def blocks(self, group: KVGroup, tokens: int) -> int:
        """Blocks of one group when all requests together have `tokens` positions; the null block included."""
        size = group.block_size or self.max_len
        blocks = -(-tokens // size)
        if group.kind == "window" and group.window is not None:
            seen = group.window - 1 + self.lookback + self.ahead
            one, each = (-(-(seen + step) // size) + 1 for step in (self.chunk, self.decode))
            ahead = (self.depth - 1) * -(-self.chunk // size)
            blocks = min(blocks, one + (self.slots - 1) * each + ahead)
        return blocks + 1

    def bytes(self, tokens: int) -> int:
        return sum(self.blocks(group, tokens) * group.bytes_per_block for group in self.groups)

    @property
    def most(self) -> int:
        """Positions that all slots can ever fill, rounded up to whole blocks."""
        size = max((group.block_size or self.max_len for group in self.groups), default=1)
        return self.slots * -(-self.longest // size) * size

    @property
    def longest(self) -> int:
        """Positions of the longest request; one that has a single block writes nothing beyond it."""
        single = all((group.block_size or self.max_len) >= self.max_len for group in self.groups)
        return self.max_len if single else self.max_len + self.ahead


def settle(config: EngineConfig, report: WorkerReport, depth: int) -> Allocation:
    """The sizes of an engine. Raises CapacityError when not even one request of the asked length fits."""
    max_model_len = _max_model_len(config, report, depth)
    need = _need(config, report, max_model_len, depth)
    tokens = _largest(need.longest, need.most, lambda n: _fits(config, report, need, n))
    return Allocation(
        num_blocks=tuple(need.blocks(group, tokens) for group in need.groups),
        max_slots=config.max_requests,
        max_model_len=max_model_len,
        max_tokens_per_step=config.max_tokens_per_step,
        draft_width=report.draft_width,
        draft_ahead=report.draft_ahead,
        lookback=report.lookback,
    )


def capacity(report: WorkerReport, allocation: Allocation) -> int:
    """Positions that the KV of a full-attention group (of any, if there is none) can hold."""
    sizes = [(g.block_size or allocation.max_model_len) * (n - 1) for g, n in zip(report.groups, allocation.num_blocks)]
    return max(sizes, default=allocation.max_slots * allocation.max_model_len)


def _need(config: EngineConfig, report: WorkerReport, max_model_len: int, depth: int) -> Need:
    decode = 1 + report.draft_width
    chunk = min(config.max_prompt_chunk or config.max_tokens_per_step, config.max_tokens_per_step, max_model_len)
    steps = (max(chunk, decode), decode, depth)
    return Need(report.groups, max_model_len, config.max_requests, *steps, report.draft_ahead, report.lookback)


def _fits(config: EngineConfig, report: WorkerReport, need: Need, tokens: int) -> bool:
    if config.kv_blocks is not None:
        return all(need.blocks(group, tokens) <= config.kv_blocks for group in need.groups)
    return need.bytes(tokens) <= report.kv_budget_bytes


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest n in [low, high] that fits, given that `low` does and that smaller ones fit better."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _max_model_len(config: EngineConfig, report: WorkerReport, depth: int) -> int:
    def fits(length: int) -> bool:
        need = _need(config, report, length, depth)
        return _fits(config, report, need, need.longest)

    wanted = report.max_model_len if config.max_model_len == "auto" else config.max_model_len
    if fits(wanted):
        return wanted
    possible = _largest(1, wanted, fits) if fits(1) else 0
    if config.max_model_len == "auto" and possible >= LEAST:
        return possible
    raise CapacityError(_too_small(config, report, wanted, possible, depth))


def _too_small(config: EngineConfig, report: WorkerReport, wanted: int, possible: int, depth: int) -> str:
    need = _need(config, report, wanted, depth)
    if config.kv_blocks is not None:
        blocks = max(need.blocks(group, need.longest) for group in need.groups)
        have, change = f"it needs {blocks} blocks, engine.kv_blocks is {config.kv_blocks}", "engine.kv_blocks"
    else:
        have = f"its KV needs {show(need.bytes(need.longest))}, there are {show(report.kv_budget_bytes)}"
        change = "engine.kv_memory or engine.memory_fraction"
    shorter = f"set engine.max_model_len to {possible} or less, or " if possible >= LEAST else ""
    return f"one request of max_model_len {wanted} does not fit: {have}; {shorter}raise {change} ({split(report.memory)})"


def split(memory: Mapping[str, int]) -> str:
    """The memory split of a worker in words."""
    return ", ".join(f"{name} {show(size)}" for name, size in memory.items())


def show(size: int) -> str:
    """Bytes for people."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{size / (1 << shift):.{1 if size < 100 << shift else 0}f} {unit}"
    return f"{size} bytes"


def summary(model: str, device: str, report: WorkerReport, allocation: Allocation, seconds: float) -> str:
    """The line an engine says when it has started."""
    tokens = capacity(report, allocation)
    blocks = " + ".join(f"{n - 1:,} blocks of {g.block_size or 'any size'}" for g, n in zip(report.groups, allocation.num_blocks))
    return (
        f"{model} on {device}: {split(report.memory)}; KV for {tokens:,} tokens ({blocks or 'no blocks'}), "
        f"{tokens / allocation.max_model_len:.1f} requests of {allocation.max_model_len:,} tokens at once, "
        f"at most {allocation.max_slots}; started in {seconds:.1f} s"
    )
