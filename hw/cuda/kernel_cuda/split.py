"""Which rows of a step go through torch's flash attention, decided on the host.

Flash wants a row's keys one after another, so they are gathered from the pages first; then it does the row faster than our
kernel does it over pages (H200, 4 x 4,096 tokens: 920 us for 1,749 with heads of 128, 635 for 879 with heads of 64). What that
saves is, counted at flash's rate, `gain` of the row's operations; what it costs is reading its keys and values, writing them
again, and a few launches. With Hq query heads, Hkv KV heads of D, q queries that see `pairs` keys in all, and n keys,

    saved     gain * 4 * Hq * D * pairs                        operations
    gathered  2 (K, V) * 2 (read, write) * 2 * n * Hkv * D     bytes

so that, for a row much longer than its chunk (pairs = q * n) and a GPU that does 150 operations while it moves a byte, gathering
pays from 300 * Hkv / Hq / gain queries on: about 83 in groups of four heads of 128, whatever the length; for a whole prompt
(pairs = q * q / 2) from twice as many. The sizes decide, a row at a time: a row goes the same way whoever shares the step.

A step's rows lie as the scheduler put them. A call takes all tokens from `begin` to `end`: its rows with their keys, and what is
between them as rows of queries without keys. Flash skips those, and our kernels write their results over what it left there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernel_core.api import StepPlan
from kernel_core.nn.api import AttentionBatch, AttentionSpec, Step, upload


@dataclass(frozen=True, slots=True)
class HostRows:
    """What the host knows of a step's rows: `q` int64 [R] tokens, exact, and `kv` int64 [R], no less than their KV lengths."""

    q: np.ndarray
    kv: np.ndarray


@dataclass(frozen=True, slots=True)
class KnownBatch(AttentionBatch):
    """A batch of which the host knows the rows."""

    rows: HostRows | None = None


class KnownInputs:
    """The runner part "step_inputs" around another: where a row has several tokens, batches with `rows`. Host."""

    def __init__(self, make: Callable[..., Any], *parts: Any) -> None:
        self._inputs = make(*parts)

    def build(self, plan: StepPlan) -> Step:
        step: Step = self._inputs.build(plan)
        if step.layout.max_q > 1:
            q = np.array(plan.q, np.int64)
            rows = HostRows(q, np.asarray(plan.start, np.int64) + q)
            step.attention = [known(batch, rows) for batch in step.attention]
        return step


def known(batch: AttentionBatch, rows: HostRows) -> KnownBatch:
    return KnownBatch(**{field.name: getattr(batch, field.name) for field in fields(AttentionBatch)}, rows=rows)


@dataclass(frozen=True, slots=True)
class Rule:
    """When a row goes to flash. `per_byte`: operations that flash does while a byte is copied (600 TFLOP/s, 4 TB/s); `launches`:
    those that it does while what a call adds is launched (8 us); `most_bytes`: of the gathered K and V of one call; `gains`:
    (head size up to which, gain)."""

    per_byte: float = 150.0
    launches: float = 5e9
    most_bytes: int = 256 << 20
    gains: tuple[tuple[int, float], ...] = ((64, 0.4), (256, 0.9))

    def takes(self, rows: HostRows, spec: AttentionSpec) -> np.ndarray:
        """bool [R]."""
        keys = seen_keys(rows, spec.window)
        kept = keys * token_bytes(spec)
        gain = next((gain for most, gain in self.gains if spec.head_dim <= most), 0.0)
        saved = gain * 4 * spec.num_heads * spec.head_dim * seen_pairs(rows, spec.window)
        return (rows.q > 1) & (kept <= self.most_bytes) & (saved >= 2 * kept * self.per_byte + self.launches)


RULE = Rule()


def token_bytes(spec: AttentionSpec) -> int:
    """Of the K and V of a token, gathered: flash does bf16 and fp16."""
    return 2 * spec.num_kv_heads * (spec.head_dim + spec.v_head_dim)


def seen_keys(rows: HostRows, window: int | None) -> np.ndarray:
    """The keys of each row that one of its queries sees: its last ones."""
    return rows.kv if window is None else np.minimum(rows.kv, rows.q + window - 1)


def seen_pairs(rows: HostRows, window: int | None) -> np.ndarray:
    """Pairs of a query and a key that it sees."""
    context = rows.kv - rows.q
    if window is None:
        return rows.q * context + rows.q * (rows.q + 1) // 2
    few = np.clip(window - 1 - context, 0, rows.q)  # queries that see fewer than the window holds
    return few * context + few * (few + 1) // 2 + (rows.q - few) * window


@dataclass(frozen=True, slots=True)
class Call:
    """A call of flash for the tokens [begin, end) of a step: S rows, some of them without keys. `slots` int64 [n]: the cache
    slots of the keys, row after row, -1 at the end where there are fewer."""

    begin: int
    end: int
    q_start: Tensor  # [S + 1] int32, counted from `begin`
    k_start: Tensor  # [S + 1] int32
    slots: Tensor
    max_q: int  # of the rows that have keys
    max_k: int


@dataclass(frozen=True, slots=True)
class Split:
    """`calls` cover all tokens of the step. `kv_len` [R] int32: of the other rows, 0 for those of the calls; `max_q` and `tokens`
    count the other rows alone."""

    calls: Sequence[Call]
    kv_len: Tensor
    max_q: int
    tokens: int


def split(batch: AttentionBatch, spec: AttentionSpec, rule: Rule) -> Split | None:
    """None: flash takes no row, or the host does not know them. Nothing is read from the device. Rate: step."""
    rows = batch.rows if isinstance(batch, KnownBatch) else None
    if rows is None or batch.tree is not None:
        return None
    taken = rule.takes(rows, spec)
    if not taken.any():
        return None
    most_keys = rule.most_bytes // token_bytes(spec)
    calls = [
        _call(batch, spec.window, rows, part, begin, end) for part, begin, end in _parts(rows, taken, most_keys, spec.window)
    ]
    others = upload(~taken, batch.kv_len.device)
    left = rows.q[~taken]
    return Split(calls, batch.kv_len * others, int(left.max(initial=0)), int(left.sum()))


def _parts(rows: HostRows, taken: np.ndarray, most_keys: int, window: int | None) -> list[tuple[np.ndarray, int, int]]:
    """The taken rows in calls that gather at most `most_keys` keys → (rows, begin, end), the tokens of all calls together being
    those of the step."""
    groups: list[list[int]] = [[]]
    keys, held = seen_keys(rows, window), 0
    for row in np.flatnonzero(taken).tolist():
        if groups[-1] and held + keys[row] > most_keys:
            groups.append([])
            held = 0
        groups[-1].append(row)
        held += keys[row]
    ends = np.cumsum(rows.q)
    last = [int(ends[group[-1]]) for group in groups]
    last[-1] = int(ends[-1])
    return [(np.array(group), begin, end) for group, begin, end in zip(groups, [0, *last[:-1]], last, strict=True)]


def _call(batch: AttentionBatch, window: int | None, rows: HostRows, part: np.ndarray, begin: int, end: int) -> Call:
    """Before each row of `part`, and at the end, a row of the tokens that are not theirs."""
    device, queries, keys = batch.kv_len.device, rows.q[part], seen_keys(rows, window)[part]
    ends = np.cumsum(rows.q)[part] - begin
    q_start = np.zeros(2 * len(part) + 2, np.int32)
    q_start[1:-1:2], q_start[2:-1:2], q_start[-1] = ends - queries, ends, end - begin
    on, q = upload(np.stack([part, queries]), device)
    length = batch.kv_len[on].long()
    stop = (length if window is None else torch.minimum(length, q + (window - 1))).cumsum(0)
    k_start = torch.cat([stop.new_zeros(2), torch.stack([stop, stop], 1).flatten()]).int()
    slots = _slots(batch, on, length, stop, int(keys.sum()))
    return Call(begin, end, upload(q_start, device), k_start, slots, int(queries.max()), int(keys.max()))


def _slots(batch: AttentionBatch, rows: Tensor, length: Tensor, stop: Tensor, room: int) -> Tensor:
    """The last keys of `rows` [n], whose KV is `length` [n] long: those of row i are numbered from stop[i - 1] to stop[i]."""
    key = torch.arange(room, device=stop.device)
    at = torch.searchsorted(stop, key, right=True).clamp(max=len(stop) - 1)
    place = length[at] - stop[at] + key
    column = (place // batch.block_size).clamp(max=batch.block_table.shape[1] - 1)
    slots = batch.block_table[rows[at], column].long() * batch.block_size + place % batch.block_size
    return torch.where(key < stop[-1], slots, -1)
