"""What the worker keeps of running requests, by slot: tokens, true counts, waiting drafts, block tables, sampling numbers.

The true counts live on the device: with several plans in flight the host knows upper bounds only. What a request asked for
(temperature, number of logprobs) never changes, so the host keeps a copy of it and decides by that without asking the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernel_core.nn.draws import split_key
from kernel_core.nn.transfer import upload, upload_columns
from kernel_core.plan import NO_TOKEN, BlockUpdate, Opened

FLOATS = ("temperature", "top_p", "min_p")
SAMPLING = (*FLOATS, "top_k", "logprobs", "prompt_logprobs", "num_prompt_tokens", "max_drafts")


class SlotTable:
    """`tokens` [S, L + 1] int32 (the last column takes what is not kept), `known`, `computed`, `num_prompt` [S] int32,
    `key` [S, 2] int32, `drafts` [S, m] int64 (-1 absent), `parents` [S, m] int32, `temperature`, `top_p`, `min_p` [S]
    float32, `top_k`, `max_drafts` [S] int32, all on the device; `host[name]` [S] numpy copies of what a request asked for. The
    last of the S slots is nobody's: rows that only fill a step up to a size name it."""

    def __init__(self, max_slots: int, max_len: int, draft_width: int, device: torch.device) -> None:
        self.device, self.max_len, self.draft_width = device, max_len, draft_width
        self.padding = max_slots
        max_slots += 1
        zeros = lambda *shape, dtype=torch.int32: torch.zeros(*shape, dtype=dtype, device=device)  # noqa: E731
        self.tokens = zeros(max_slots, max_len + 1)
        self.known, self.computed, self.num_prompt, self.top_k, self.max_drafts = (zeros(max_slots) for _ in range(5))
        self.key = zeros(max_slots, 2)
        self.temperature, self.top_p, self.min_p = (zeros(max_slots, dtype=torch.float32) for _ in FLOATS)
        self.drafts = torch.full((max_slots, draft_width), NO_TOKEN, dtype=torch.int64, device=device)
        self.chain = torch.arange(-1, draft_width - 1, dtype=torch.int32, device=device)
        self.parents = self.chain.repeat(max_slots, 1)
        self.known[self.padding] = 1
        self.host = {name: np.zeros(max_slots, np.float32 if name in FLOATS else np.int32) for name in SAMPLING}
        self.host["logprobs"][self.padding] = self.host["prompt_logprobs"][self.padding] = -1

    def filters(self, slots: np.ndarray) -> np.ndarray:
        """Which of some slots use min_p, top_k or top_p, bool. Host."""
        return (self.host["min_p"][slots] > 0) | (self.host["top_k"][slots] > 0) | (self.host["top_p"][slots] < 1)

    def open(self, opened: Sequence[Opened]) -> None:
        """Fill the slots of new requests. Rate: step, only when there are any."""
        for item in opened:
            for name in SAMPLING:
                self.host[name][item.slot] = getattr(item.sampling, name)
            ids = np.asarray(item.token_ids, np.int32)
            self.tokens[item.slot, : len(ids)] = upload(ids, self.device)
        slots = np.array([item.slot for item in opened])
        keys = [split_key(item.key) for item in opened]
        columns = {
            "slot": slots,
            "known": [len(item.token_ids) for item in opened],
            "computed": [item.computed for item in opened],
            "num_prompt": self.host["num_prompt_tokens"][slots],
            "top_k": self.host["top_k"][slots],
            "max_drafts": self.host["max_drafts"][slots],
            "low": [low for low, _ in keys],
            "high": [high for _, high in keys],
        }
        got = upload_columns(columns, self.device)
        slot = got.pop("slot")
        self.key[slot] = torch.stack([got.pop("low"), got.pop("high")], 1).int()
        for name, values in got.items():
            getattr(self, name)[slot] = values.int()
        floats = upload(np.stack([self.host[name][slots] for name in FLOATS]), self.device)
        for name, values in zip(FLOATS, floats, strict=True):
            getattr(self, name)[slot] = values
        self.drafts.index_fill_(0, slot, NO_TOKEN)
        self.parents[slot] = self.chain


class BlockTables:
    """The block tables of all KV groups, `tables[g]` [S, B] int32 on the device; block 0 is the null one. S as in `SlotTable`."""

    def __init__(self, num_groups: int, max_slots: int, max_len: int, block_size: int, device: torch.device) -> None:
        self.block_size, self.device = block_size, device
        columns = -(-max_len // block_size) if block_size else 1
        self.tables = [torch.zeros(max_slots + 1, columns, dtype=torch.int32, device=device) for _ in range(num_groups)]

    def open(self, slots: np.ndarray) -> None:
        """Forget what earlier owners of the slots held. Rate: step, only when requests open."""
        index = upload(np.asarray(slots, np.int64), self.device)
        for table in self.tables:
            table.index_fill_(0, index, 0)

    def update(self, new_blocks: Sequence[BlockUpdate]) -> None:
        """Enter the plan's new blocks. Rate: step."""
        for table, new in zip(self.tables, new_blocks):
            if len(new.slots):
                got = upload_columns({"slots": new.slots, "columns": new.columns, "ids": new.ids}, self.device)
                table[got["slots"], got["columns"]] = got["ids"].int()

    def rows(self, group: int, slots: Tensor, max_kv: int) -> Tensor:
        """The tables of some slots, wide enough for `max_kv` tokens → [R, B'] int32."""
        return self.tables[group][slots, : self.columns(max_kv)]

    def columns(self, max_kv: int) -> int:
        """How many columns hold `max_kv` tokens, or as many as there are."""
        return min(-(-max_kv // self.block_size), self.tables[0].shape[1])

    def kv_slots(self, table: Tensor, row: Tensor, position: Tensor) -> Tensor:
        """Cache slots (block * block_size + offset) int64 of positions [n] of rows [n] of a `rows()` table."""
        column = (position // self.block_size).clamp_(max=table.shape[1] - 1)
        return table[row, column].long() * self.block_size + position % self.block_size
