"""The model of a small step as a CUDA graph, whatever its requests ask for: the runner part "graphs".

`steady` does whole steps, of requests that need nothing but a draw. In any other step of few tokens, where drafts are verified,
logits transformed or logprobs told, the model is nearly all of what the host has to launch; here it is one graph, and so is each
pass of a drafter's layers. Inputs are copied to where the graph reads them. What they lack up to its sizes are tokens of rows
that nobody has: they read the null block, and nothing of theirs is written.

Steps with parts of prompts are captured too, attention included, as long as launching takes the host longer than computing
takes the GPU. Beyond, graphs gain nothing, and prompts are better off with torch's flash attention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from kernel_core.nn.api import AttentionBatch, Forward
from kernel_cuda.attention import Plan
from kernel_cuda.capture import LENGTHS, Attempts, Record, sizes_up_to
from kernel_cuda.kernels.machine import processors

WIDEST = 16  # tokens of a row, at most: more is part of a prompt
MIXED = (64, 96, 128, 192, 256, 384, 512, 768, 1024)  # tokens of the steps with prompts that have graphs
LAUNCHED = 1e-4  # seconds in which the host launches a layer
RATE = 3e12  # operations that a multiprocessor does in a second
MOST_GRAPHS = 64
SIGHTINGS = 2  # steps of a shape before it is captured


@dataclass(frozen=True, slots=True)
class Shape:
    """What graphs of a module differ in. `width`: most tokens of a row, all of them in a step with prompts; `others`: shapes
    beyond the tokens, and dtypes."""

    tokens: int
    rows: int
    width: int
    length: int
    tapped: bool
    trees: tuple[tuple[bool, bool], ...]  # per group: is there a tree, are there positions
    others: tuple[Any, ...]


class ForwardGraphs:
    """Callable as the module is. `most_tokens`: of a step that is captured."""

    def __init__(self, module: nn.Module, record: Record, most_tokens: int, sightings: int = SIGHTINGS) -> None:
        self.module, self._record, self._sightings = module, record, sightings
        self.sizes = sizes_up_to(most_tokens)
        self._numbers = sum(parameter.numel() for parameter in module.parameters())
        self.graphs: dict[Shape, ForwardGraph] = {}
        self._seen: Counter[Shape] = Counter()
        self._attempts = Attempts(type(module).__name__)
        self._kv: Any = None  # that the graphs read

    def __call__(self, fwd: Forward, *others: Tensor) -> Any:
        """The module's results, the caller's own. Rate: step."""
        plans = _plans(fwd, others) if self._attempts.usable else None
        shape = self._shape(fwd, plans, others) if plans else None
        if shape is None:
            return self.module(fwd, *others)
        if fwd.kv is not self._kv:  # a drafter's layers outlive the runner that was measured at the start
            self._kv, self._attempts.full = fwd.kv, False
            self.graphs.clear()
            self._seen.clear()
        graph = self.graphs.get(shape) or self._made(shape, fwd, plans, others)
        return self.module(fwd, *others) if graph is None else graph.run(fwd, [plan.batch for plan in plans], others)

    def _shape(self, fwd: Forward, plans: Sequence[Plan], others: Sequence[Tensor]) -> Shape | None:
        """None: such a step has no graph."""
        batches = [plan.batch for plan in plans]
        trees = tuple((batch.tree is not None, batch.positions is not None) for batch in batches)
        longest_row = max(batch.max_q for batch in batches)
        wide = longest_row > WIDEST
        sizes = self._mixed(fwd) if wide else self.sizes
        tokens = next((size for size in sizes if size >= len(fwd.token_ids)), None)
        if tokens is None or (wide and any(tree for tree, _ in trees)):
            return None
        width = tokens if wide else 1 << (longest_row - 1).bit_length()
        rows = len(batches[0].kv_len) + -(-(tokens - len(fwd.token_ids)) // width)
        rows = 1 << (rows - 1).bit_length() if wide else next(size for size in self.sizes if size >= rows)
        longest = max(batch.max_kv for batch in batches)
        length = next((length for length in LENGTHS if length >= longest), 1 << (longest - 1).bit_length())
        return Shape(tokens, rows, width, length, fwd.tapped, trees, tuple((x.shape[1:], x.dtype) for x in others))

    def _mixed(self, fwd: Forward) -> list[int]:
        """Tokens of the steps with prompts that the GPU computes while the host would still launch."""
        rate = processors(fwd.token_ids.device) * RATE
        most = len(fwd.attention) * LAUNCHED * rate / (2 * max(self._numbers, 1))
        return [size for size in MIXED if size <= most]

    def _made(self, shape: Shape, fwd: Forward, plans: Sequence[Plan], others: Sequence[Tensor]) -> ForwardGraph | None:
        self._seen[shape] += 1
        if self._seen[shape] < self._sightings or len(self.graphs) == MOST_GRAPHS:
            return None
        make = partial(ForwardGraph, self.module, shape, fwd, plans, others, self._record)
        graph = self._attempts(make, f"{shape.tokens} tokens of {shape.rows} rows")
        if graph is not None:
            self.graphs[shape] = graph
        return graph


def _plans(fwd: Forward, others: Sequence[Tensor]) -> list[Plan] | None:
    """The attention plans of a step that can be captured, one a group."""
    tokens = len(fwd.token_ids)
    if not tokens or fwd.inputs or fwd.embeds is not None or fwd.positions.dim() != 1:
        return None
    plans = list({id(plan): plan for plan in fwd.attention.values()}.values())
    fits = all(isinstance(plan, Plan) and len(plan.batch.slot_mapping) == tokens for plan in plans)
    return plans if plans and fits and all(len(other) == tokens for other in others) else None


class ForwardGraph:
    """A captured run of a module, and the tensors that it reads."""

    def __init__(
        self, module: nn.Module, shape: Shape, fwd: Forward, plans: Sequence[Plan], others: Sequence[Tensor], record: Record
    ) -> None:
        self.shape = shape
        self._batches = [_Batch(shape, plan.batch) for plan in plans]
        self._ids, self._positions = (x.new_zeros(shape.tokens) for x in (fwd.token_ids, fwd.positions))
        self._others = [x.new_zeros(shape.tokens, *x.shape[1:]) for x in others]
        self._filled = (-1, -1)
        group = {id(plan): number for number, plan in enumerate(plans)}
        groups = {layer: group[id(plan)] for layer, plan in fwd.attention.items()}
        self._fit(0, 0)

        def step() -> tuple[Any, dict[str, Tensor]]:
            own = [plan.of(batch.batch) for plan, batch in zip(plans, self._batches, strict=True)]
            attention = {layer: own[number] for layer, number in groups.items()}
            mine = Forward(self._ids, self._positions, fwd.kv, attention, tapped=shape.tapped)
            return module(mine, *self._others), mine.taps

        self._replay, (self._results, self._taps) = record(step)
        results = tree_leaves((self._results, self._taps))
        if not all(isinstance(x, Tensor) and x.shape[:1] == (shape.tokens,) for x in results):
            raise RuntimeError("its results are not one for each token")

    def run(self, fwd: Forward, batches: Sequence[AttentionBatch], others: Sequence[Tensor]) -> Any:
        """Load the inputs and replay → results; taps are put into `fwd`."""
        tokens = len(fwd.token_ids)
        self._fit(len(batches[0].kv_len), tokens)
        self._ids[:tokens].copy_(fwd.token_ids)
        self._positions[:tokens].copy_(fwd.positions)
        for mine, other in zip(self._others, others, strict=True):
            mine[:tokens].copy_(other)
        for mine, batch in zip(self._batches, batches, strict=True):
            mine.load(batch)
        self._replay()
        fwd.taps.update({name: state[:tokens].clone() for name, state in self._taps.items()})
        return tree_map(lambda x: x[:tokens].clone(), self._results)

    def _fit(self, rows: int, tokens: int) -> None:
        """Make the rest neutral, where it is another rest than last time."""
        if self._filled == (rows, tokens):
            return
        self._filled = rows, tokens
        for rest in (self._ids, self._positions, *self._others):
            rest[tokens:].zero_()
        for batch in self._batches:
            batch.fit(rows, tokens)


class _Batch:
    """A group's part of the inputs."""

    def __init__(self, shape: Shape, like: AttentionBatch) -> None:
        tokens, rows, width = shape.tokens, shape.rows, shape.width
        table = like.block_table.new_zeros(rows, -(-shape.length // like.block_size))
        tree = None if like.tree is None else like.tree.new_ones(tokens, width)
        positions = None if like.positions is None else like.positions.new_zeros(tokens)
        q_start, kv_len = like.q_start.new_zeros(rows + 1), like.kv_len.new_zeros(rows)
        slots = like.slot_mapping.new_full((tokens,), -1)
        self.batch = AttentionBatch(q_start, kv_len, table, slots, like.block_size, width, shape.length, tree, positions)
        self._ramp = torch.arange(rows + 1, dtype=q_start.dtype, device=q_start.device) * width
        self._tokens = tokens

    def fit(self, rows: int, tokens: int) -> None:
        """The tokens beyond those of the step belong to further rows, as many to each as it may have."""
        mine = self.batch
        torch.clamp(self._ramp[: len(self._ramp) - rows] + tokens, max=self._tokens, out=mine.q_start[rows:])
        torch.sub(mine.q_start[rows + 1 :], mine.q_start[rows:-1], out=mine.kv_len[rows:])
        mine.block_table[rows:].zero_()
        mine.slot_mapping[tokens:].fill_(-1)
        if mine.tree is not None:
            mine.tree[tokens:].fill_(True)
        if mine.positions is not None:
            mine.positions[tokens:].zero_()

    def load(self, batch: AttentionBatch) -> None:
        mine, rows, tokens = self.batch, len(batch.kv_len), len(batch.slot_mapping)
        mine.q_start[: rows + 1].copy_(batch.q_start)
        mine.kv_len[:rows].copy_(batch.kv_len)
        mine.block_table[:rows, : batch.block_table.shape[1]].copy_(batch.block_table)
        mine.slot_mapping[:tokens].copy_(batch.slot_mapping)
        if batch.tree is not None:
            mine.tree[:tokens, : batch.tree.shape[1]].copy_(batch.tree)
        if batch.positions is not None:
            mine.positions[:tokens].copy_(batch.positions)
