"""A toy model on the runner, a small driver in the scheduler's place, and the same thing written out densely as oracle."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from kernel_core.nn.kv import AttentionChoice, KVStore, attention_specs, kv_groups
from kernel_core.nn.protocols import AttentionSpec
from kernel_core.nn.reference_attention import ReferenceAttention
from kernel_core.nn.runner import Runner
from kernel_core.plan import Allocation, BlockUpdate, Opened, SamplingRow, StepPlan

V, H, HEADS, KV_HEADS, D, MAX_LEN, BLOCK = 53, 32, 4, 2, 8, 96, 4
CPU = torch.device("cpu")


class ToyAttention(nn.Module):
    def __init__(self, layer: str, window: int | None, backend):
        super().__init__()
        kind = "full" if window is None else "window"
        self.spec = AttentionSpec(layer, HEADS, KV_HEADS, D, D, D**-0.5, kind, window)
        self.backend = backend
        self.qkv = nn.Linear(H, (HEADS + 2 * KV_HEADS) * D, bias=False)
        self.out = nn.Linear(HEADS * D, H, bias=False)

    def split(self, x):
        q, k, v = self.qkv(x).split([HEADS * D, KV_HEADS * D, KV_HEADS * D], -1)
        return q.view(-1, HEADS, D), k.view(-1, KV_HEADS, D), v.view(-1, KV_HEADS, D)

    def forward(self, x, fwd):
        layer = self.spec.layer
        attended = self.backend.forward(*self.split(x), fwd.kv[layer], fwd.attention[layer], self.spec, None)
        return x + self.out(attended.flatten(1))

    def dense(self, x):
        """The formula over a whole sequence: softmax(q k / sqrt(d)) v for every head and position."""
        q, k, v = (t.numpy().astype(np.float64) for t in self.split(x))
        out, ago = np.zeros((len(q), HEADS, D)), np.arange(len(q))[:, None] - np.arange(len(q))
        seen = (ago >= 0) & (ago < (self.spec.window or MAX_LEN))
        for h in range(HEADS):
            score = np.where(seen, q[:, h] @ k[:, h // 2].T / np.sqrt(D), -np.inf)
            weight = np.exp(score - score.max(1, keepdims=True))
            out[:, h] = weight / weight.sum(1, keepdims=True) @ v[:, h // 2]
        return x + self.out(torch.from_numpy(out).float().flatten(1))


class ToyModel(nn.Module):
    """Embedding and positions, a full and a window layer, a head."""

    tap_points: ClassVar = {}

    def __init__(self, window: int | None = 5):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, H)
        self.place = nn.Embedding(MAX_LEN + 8, H)
        backend = ReferenceAttention()
        self.layers = nn.ModuleList([ToyAttention("layers.0", None, backend), ToyAttention("layers.1", window, backend)])
        self.head = nn.Linear(H, V, bias=False)
        self.head_rows = []  # how many rows the head was asked for, call by call
        for p in self.parameters():
            p.requires_grad_(False).normal_(0, 0.25 if p.shape[0] > V else 0.5)
        for layer in self.layers:
            layer.qkv.weight.mul_(0.5)
        self.head.weight.mul_(0.2)  # a head that is not sure of itself, or sampling would show nothing

    def forward(self, fwd):
        x = self.table(fwd.token_ids) + self.place(fwd.positions)
        for layer in self.layers:
            x = layer(x, fwd)
        return x

    def logits(self, hidden):
        self.head_rows.append(len(hidden))
        return self.head(hidden)

    def dense_logits(self, tokens):
        """[n] tokens → [n, V] logits, without paging, chunks or batches."""
        x = self.table(torch.tensor(tokens)) + self.place(torch.arange(len(tokens)))
        for layer in self.layers:
            x = layer.dense(x)
        return self.head(x).numpy()


def make_runner(model=None, *, slots=8, width=0, ahead=0, blocks=200, dtype=torch.float32, layers=None, **parts) -> Runner:
    """`layers`: the module with a drafter's own layers."""
    model = model or ToyModel()
    choose = AttentionChoice([ReferenceAttention()], dtype, BLOCK)
    own = attention_specs(layers) if layers is not None else []
    specs = attention_specs(model) + own
    groups = kv_groups(specs, choose, dtype, BLOCK)
    kv = KVStore(specs, groups, [blocks] * len(groups), choose, dtype, CPU)
    allocation = Allocation((blocks,) * len(groups), slots, MAX_LEN, 2048, width, ahead)
    names = frozenset(spec.layer for spec in own)
    return Runner(model, kv, allocation, vocab_size=V, draft_layers=names, **parts)


@dataclass
class Toy:
    """One request as the driver sees it; `computed`, `bound` are upper bounds."""

    slot: int
    prompt: list[int]
    max_new: int
    sampling: SamplingRow
    key: int
    payloads: dict[str, bytes]
    flags: int = 0
    computed: int = 0
    bound: int = 0
    in_flight: int = 0
    out: list[int] = field(default_factory=list)
    failed: str | None = None
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    blocks: int = 0

    @property
    def done(self):
        return self.failed is not None or len(self.out) >= self.max_new


class Driver:
    """The scheduler's part in the smallest form: bounds, room, blocks one after the other. `depth` plans in flight."""

    def __init__(self, runner: Runner, *, chunk=1000, width=0, depth=1, ahead=0):
        self.runner, self.chunk, self.width, self.depth, self.ahead = runner, chunk, width, depth, ahead
        self.requests: list[Toy] = []
        self.opening: list[Opened] = []
        self.closing: list[int] = []
        self.flight: list = []
        self.plan_id, self.next_block, self.steps = 0, 1, 0

    def add(self, prompt, max_new=8, key=1, payloads=None, flags=0, slot=None, **sampling) -> Toy:
        row = SamplingRow(num_prompt_tokens=len(prompt), **{"temperature": 0.0, **sampling})
        slot = len(self.requests) if slot is None else slot
        toy = Toy(slot, list(prompt), max_new, row, key, payloads or {}, flags, bound=len(prompt))
        self.requests.append(toy)
        ids = np.array(prompt, np.int32)
        self.opening.append(Opened(slot, f"r{slot}", ids, 0, key, row, toy.payloads))
        return toy

    def close(self, toy: Toy):
        self.closing.append(toy.slot)
        self.requests.remove(toy)

    def plan(self) -> StepPlan:
        rows = []
        for toy in self.requests:
            max_len = len(toy.prompt) + toy.max_new
            if toy.done or toy.bound >= max_len:
                continue
            behind = toy.bound - toy.computed
            take = min(behind, self.chunk)
            room = 0 if take < behind else min(1 + (self.width if toy.bound > len(toy.prompt) else 0), max_len - toy.bound)
            rows.append((toy, toy.computed, take + max(room - 1, 0), room))
        updates = self.grow([(toy, start + q + self.ahead) for toy, start, q, _ in rows])
        column = lambda i: np.array([r[i] for r in rows], np.int32)  # noqa: E731
        plan = StepPlan(
            self.plan_id,
            np.array([r[0].slot for r in rows], np.int32),
            column(1),
            column(2),
            column(3),
            np.zeros(len(rows), np.int32),
            np.array([r[0].flags for r in rows], np.int32),
            opened=tuple(self.opening),
            closed=np.array(self.closing, np.int32),
            new_blocks=updates,
        )
        self.opening, self.closing, self.plan_id = [], [], self.plan_id + 1
        for toy, start, q, room in rows:
            toy.computed, toy.bound, toy.in_flight = start + q, toy.bound + room, toy.in_flight + 1
        return plan

    def grow(self, wanted):
        slots, columns, ids = [], [], []
        for toy, length in wanted:
            while toy.blocks * BLOCK < length:
                slots.append(toy.slot), columns.append(toy.blocks), ids.append(self.next_block)
                toy.blocks, self.next_block = toy.blocks + 1, self.next_block + 1
        new = BlockUpdate(*(np.array(a, np.int32) for a in (slots, columns, ids)))
        return (new,) * len(self.runner.kv.groups)

    def commit(self, plan, result):
        by_slot = {toy.slot: toy for toy in self.requests}
        for row, slot in enumerate(plan.rows.tolist()):
            toy = by_slot[slot]
            toy.in_flight -= 1
            got = result.tokens[result.offsets[row] : result.offsets[row + 1]].tolist()
            if toy.done:
                continue
            toy.out = (toy.out + got)[: toy.max_new]
            toy.drafted += int(result.drafted[row])
            toy.accepted += int(result.accepted[row])
            if not toy.in_flight:
                toy.computed, toy.bound = int(result.computed[row]), len(toy.prompt) + len(toy.out)
            for found, kept in ((result.logprobs, toy.logprobs), (result.prompt_logprobs, toy.prompt_logprobs)):
                if found is not None:
                    for i in np.flatnonzero(found.row == row):
                        kept.append((int(found.position[i]), found.token_ids[i], found.values[i], int(found.rank[i])))
        for slot, reason in result.failed:
            by_slot[slot].failed = reason

    def step(self) -> bool:
        plan = self.plan()
        if len(plan.rows) or plan.opened or len(plan.closed):
            self.flight.append((plan, self.runner.submit(plan)))
            self.steps += 1
        elif not self.flight:
            return False
        while self.flight and (len(self.flight) >= self.depth or not len(plan.rows)):
            plan_, pending = self.flight.pop(0)
            self.commit(plan_, pending.result())
        return True

    def run(self):
        while self.step():
            pass
        return [toy.out for toy in self.requests]


# ---- the oracle: dense logits, numpy randomness, filters as sets


def fmix(x):
    x = np.uint32(x)
    x ^= x >> np.uint32(16)
    x = np.uint32(x * np.uint32(0x85EBCA6B))
    x ^= x >> np.uint32(13)
    x = np.uint32(x * np.uint32(0xC2B2AE35))
    return x ^ (x >> np.uint32(16))


def numpy_bits(key: int, position: int, size: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
        a = fmix(low ^ fmix(np.uint32(position) + np.uint32(0x9E3779B9)))
        b = fmix(high ^ fmix(a + np.uint32(0x7F4A7C15)))
        x = np.arange(size, dtype=np.uint32) * np.uint32(0x9E3779B9) + a
        x ^= x >> np.uint32(16)
        x = x * np.uint32(0x85EBCA6B) ^ b
        x ^= x >> np.uint32(13)
        x = x * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))


def numpy_gumbel(bits: np.ndarray) -> np.ndarray:
    v = np.minimum(((bits.astype(np.float64) + 0.5) / 2.0**32).astype(np.float32), np.float32(1 - 2**-24))
    return -np.log(-np.log1p(-v.astype(np.float64)))


def numpy_filter(logits: np.ndarray, row: SamplingRow) -> np.ndarray:
    """float64 logits after temperature, min_p, top_k, top_p, as the definitions read; -inf: dropped."""
    x = logits.astype(np.float64) / row.temperature
    prob = np.exp(x - x.max())
    x = np.where(prob / prob.sum() >= row.min_p * (prob / prob.sum()).max(), x, -np.inf)
    if row.top_k > 0:
        x = np.where(x >= np.sort(x)[::-1][min(row.top_k, len(x)) - 1], x, -np.inf)
    if row.top_p < 1:
        prob = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        order = np.argsort(-prob, kind="stable")
        needed = int((np.cumsum(prob[order]) - prob[order] < row.top_p).sum())
        x = np.where(x >= x[order[needed - 1]], x, -np.inf)
    return x


@cache
def dense_last(window: int | None, tokens: tuple[int, ...]) -> np.ndarray:
    return ToyModel(window).dense_logits(tokens)[-1].astype(np.float64)


def oracle(prompt, max_new, row: SamplingRow, key=1, change=None, window: int | None = 5) -> list[int]:
    """What a request must give, one full dense forward a token. `change(logits, prompt, output)` edits the logits."""
    out = []
    for _ in range(max_new):
        logits = dense_last(window, (*prompt, *out)).copy()
        if change is not None:
            logits = change(logits, list(prompt), list(out))
        if row.temperature > 0:
            logits = numpy_filter(logits, row) + numpy_gumbel(numpy_bits(key, len(prompt) + len(out), V))
        out.append(int(np.argmax(logits)))
    return out
