"""The CPU device with the graphs of the CUDA device, emulated."""

from __future__ import annotations

from functools import partial

import torch
from graph_emulator import Emulator
from kernel_cuda.attention import CudaAttention, Plan
from kernel_cuda.forward import ForwardGraphs
from kernel_cuda.ops import register_history
from kernel_cuda.sampling import FusedSampler
from kernel_cuda.steady import SteadySteps
from kernel_cuda.steps import FusedAcceptance, FusedDrafting, FusedInputs
from torch import Tensor

CPU = torch.device("cpu")


class TensorAttention(CudaAttention):
    """The formula over the paged cache in whole-tensor ops, a thousand times faster than the interpreter. -1 writes into the
    null block."""

    def plan(self, batch, specs):
        return Plan(batch, lambda batch: {0: _Places(batch)})

    def forward(self, q, k, v, kv, plan, spec, sinks):
        batch, at = plan.batch, plan.work[0]
        slots = batch.slot_mapping.clamp(min=0)
        for cache, x in ((kv.k, k), (kv.v, v)):
            cache[slots // batch.block_size, :, slots % batch.block_size] = x
        keys, values = (c[at.table].transpose(2, 3).flatten(1, 2) for c in (kv.k, kv.v))  # [T, places, H, D]
        group = spec.num_heads // spec.num_kv_heads
        seen, near = at.seen, at.logical[:, None] - at.place < (spec.window or 1 << 40)
        if batch.tree is not None:
            near = near | (at.place >= at.context[:, None])
        seen = seen & near & (at.place >= spec.first_slot)
        keys, values = (x.repeat_interleave(group, 2) for x in (keys, values))
        scores = torch.einsum("thd,tphd->thp", q, keys) * spec.scale
        if spec.soft_cap:
            scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
        weights = scores.masked_fill(~seen[:, None], -1e30).softmax(-1)
        return torch.einsum("thp,tphd->thd", weights, values)

    def prepared_forward(self, q, k, v, kv, plan, spec, sinks, heads):
        from kernel_core.nn.ops import rms_norm, rotary, rotary_interleaved

        if heads.q_weight is not None:
            q, k = (rms_norm(x, w, heads.eps, None, heads.offset)[0] for x, w in ((q, heads.q_weight), (k, heads.k_weight)))
        turn = rotary_interleaved if heads.interleaved else rotary
        return self.forward(*turn(q, k, heads.cos, heads.sin, heads.positions), v, kv, plan, spec, sinks)


class _Places:
    """Where the tokens of a batch stand, and which places of their rows they see."""

    def __init__(self, batch):
        on = batch.kv_len.device
        tokens = torch.arange(len(batch.slot_mapping), device=on)
        row = torch.searchsorted(batch.q_start[1:].contiguous(), tokens.int(), right=True).clamp(max=len(batch.kv_len) - 1)
        self.context = (batch.kv_len[row] - (batch.q_start[row + 1] - batch.q_start[row])).long()
        own = self.context + tokens - batch.q_start[row]
        self.logical = own if batch.positions is None else batch.positions
        held = torch.arange(batch.block_table.shape[1], device=on) * batch.block_size < batch.kv_len[row][:, None]
        self.table = torch.where(held, batch.block_table[row], 0).long()  # beyond a row's length there may be junk
        self.place = torch.arange(self.table.shape[1] * batch.block_size, device=on)[None, :]
        self.seen = self.place <= own[:, None]
        if batch.tree is not None:
            index = self.place - self.context[:, None]
            of_step = (index >= 0) & (index < batch.q_start[row + 1][:, None] - batch.q_start[row][:, None])
            on_path = batch.tree.gather(1, index.clamp(0, batch.tree.shape[1] - 1))
            self.seen = torch.where(index >= 0, of_step & on_path, self.seen)


class Counting(ForwardGraphs):
    """`steps`: how many were replayed of those that there were."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.ran, self.others = 0, []

    def __call__(self, fwd, *others: Tensor):
        before = self._record.replays
        result = super().__call__(fwd, *others)
        replayed = self._record.replays > before
        self.ran += replayed
        if not replayed:
            self.others.append(len(fwd.token_ids))
        return result


FUSED = {
    "sampler": partial(FusedSampler, ranks=True),
    "step_inputs": FusedInputs,
    "acceptance": FusedAcceptance,
    "drafting": FusedDrafting,
}


def use(monkeypatch, backend=TensorAttention, steady=False, sightings=1, fused=False):
    """Emulate from here on → the parts "graphs" that engines make. `fused`: with the parts around the model, too."""
    parts, emulator = [], Emulator()

    def graphs(module, *others):
        parts.append(Counting(module, emulator, 32, sightings))
        return parts[-1]

    made = {"graphs": graphs} | (FUSED if fused else {})
    if steady:
        made["steady"] = partial(SteadySteps, most_rows=8, record=emulator)
    monkeypatch.setattr("kernel_cpu.device.CpuDevice.runner_parts", lambda device: made)
    monkeypatch.setattr("kernel_cpu.backend.PagedAttention", lambda: backend(CPU, torch.float32))
    monkeypatch.setattr("kernel_cpu.ops.register", lambda ops: None)
    monkeypatch.setattr("kernel_cpu.ops.register_history", register_history if fused else lambda ops: None)
    monkeypatch.setattr("kernel_cuda.kernels.attention.processors", lambda device: 1)
    monkeypatch.setattr("kernel_cuda.forward.LENGTHS", (32, 128))
    monkeypatch.setattr("kernel_cuda.forward.MIXED", (32, 64))
    monkeypatch.setattr("kernel_cuda.steady.LENGTHS", (32, 128))
    return parts
