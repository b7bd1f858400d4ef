"""A family's model without an engine: the kernel's reference ops, and KV as plain lists of tokens by request."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from kernel_safetensors.checkpoint import Safetensors

from kernel_core.config import KernelConfig
from kernel_core.nn.kv import attention_specs
from kernel_core.nn.loading import build_model
from kernel_core.nn.ops import Ops
from kernel_core.nn.protocols import AttentionSpec, Forward, ModelContext
from kernel_core.registry import find_family

CPU = torch.device("cpu")


class DenseAttention:
    """KV of a layer: request → (keys, values). The plan is a list of (request, first token, last token, start position)."""

    name, priority = "test:dense", 0

    def forward(self, q, k, v, kv, plan, spec: AttentionSpec, sinks):
        out = q.new_empty(len(q), spec.num_heads, spec.v_head_dim)
        for request, begin, end, start in plan:
            old_k, old_v = kv.get(request, (k[:0], v[:0]))
            keys, values = torch.cat([old_k, k[begin:end]]), torch.cat([old_v, v[begin:end]])
            kv[request] = keys, values
            ago = torch.arange(start, start + end - begin)[:, None] - torch.arange(len(keys))
            seen = (ago >= 0) & (ago < (spec.window or 10**9))
            scores = torch.einsum("qhd,khd->hqk", q[begin:end], keys.repeat_interleave(spec.num_heads // k.shape[1], 1))
            scores = scores * spec.scale
            if spec.soft_cap:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            scores = scores.masked_fill(~seen, float("-inf"))
            if sinks is not None:
                scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
            weights = scores.softmax(-1)[..., : len(keys)]
            out[begin:end] = torch.einsum("hqk,khd->qhd", weights, values.repeat_interleave(spec.num_heads // v.shape[1], 1))
        return out


@dataclass
class NoHooks:
    """The worker's hooks where only a checkpoint format is enabled; tests add others."""

    answers: dict = field(default_factory=dict)

    def call(self, hook, **arguments):
        if hook == "make_checkpoint":
            return [("safetensors", Safetensors())]
        return [("test", answer) for answer in self.answers.get(hook, ())]

    def chain(self, hook):
        return list(self.answers.get(hook, ()))


def context(path: str, ops: Ops | None = None, taps: tuple[str, ...] = (), **engine) -> ModelContext:
    config = KernelConfig(model=path, engine=engine)
    info = Safetensors(weights_needed=False).inspect(path)
    return ModelContext(info, config, torch.float32, CPU, ops or Ops(), lambda spec: DenseAttention(), taps=taps)


def load(path: str, hooks: NoHooks | None = None, **options):
    """The checkpoint's model, ready to run."""
    ctx = context(path, **options)
    return build_model(find_family(ctx.info.architecture), ctx, hooks or NoHooks())


class Session:
    """Feeds requests to a model in ragged batches; KV lives here."""

    def __init__(self, model) -> None:
        self.model, self.layers = model, [spec.layer for spec in attention_specs(model)]
        self.kv = {layer: {} for layer in self.layers}
        self.lengths: dict[int, int] = {}
        self.forward: Forward | None = None

    @torch.no_grad()
    def feed(self, chunks: dict[int, list[int]]) -> dict[int, torch.Tensor]:
        """request → its next tokens; → request → logits [n, V] of these tokens."""
        plan, tokens, positions = [], [], []
        for request, chunk in chunks.items():
            start = self.lengths.get(request, 0)
            plan.append((request, len(tokens), len(tokens) + len(chunk), start))
            tokens += chunk
            positions += range(start, start + len(chunk))
            self.lengths[request] = start + len(chunk)
        attention = dict.fromkeys(self.layers, plan)
        self.forward = Forward(torch.tensor(tokens), torch.tensor(positions), kv=self.kv, attention=attention)
        logits = self.model.logits(self.model(self.forward))
        return {request: logits[begin:end] for request, begin, end, _ in plan}


def ragged_logits(model, prompts: list[list[int]], chunk: int) -> list[torch.Tensor]:
    """Logits of all positions of all prompts, fed together, at most `chunk` tokens of each at a time."""
    session, parts = Session(model), [[] for _ in prompts]
    for begin in range(0, max(map(len, prompts)), chunk):
        fed = session.feed({i: p[begin : begin + chunk] for i, p in enumerate(prompts) if len(p) > begin})
        for request, logits in fed.items():
            parts[request].append(logits)
    return [torch.cat(pieces) for pieces in parts]
