"""What ranks compute together equals what one computes: column and row shards, shared KV heads, experts, the vocabulary."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dense_harness import context
from model_references import write_checkpoint

from kernel_core.errors import ConfigError
from kernel_core.nn.layers import Linear, LogitsHead, Output, UnknownPart, VocabEmbedding, shard_units
from kernel_core.nn.moe import MoE, MoEShape
from kernel_core.nn.ops import Ops

QKV = {"q": Output(32, 4), "k": Output(16, 2), "v": Output(16, 2)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("any")
    write_checkpoint(path, "llama", {})
    return context(str(path))


def ranks(base, count: int) -> list:
    """Contexts of `count` ranks whose reductions leave the partial results as they are."""
    ops = Ops()
    for name in ("all_reduce", "all_gather"):
        ops.register(name, lambda x: x, owner="test")
    return [replace(base, ops=ops, rank=rank, world_size=count) for rank in range(count)]


def filled(layer, tensors: dict):
    for part, tensor in tensors.items():
        layer.load(part, tensor)
    for module in layer.modules():
        if hasattr(module, "finish"):
            module.finish()
    return layer


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_column_shards_take_their_heads_of_every_part(base):
    tensors = {
        f"{name}.{kind}": random(o.size, *((8,) if kind == "weight" else ()))
        for name, o in QKV.items()
        for kind in ("weight", "bias")
    }
    whole = filled(Linear(base, 8, QKV, bias=True, shard="column"), tensors)
    x = random(3, 8)
    q, k, v = whole(x).split([32, 16, 16], -1)
    halves = [filled(Linear(ctx, 8, QKV, bias=True, shard="column"), tensors)(x).split([16, 8, 8], -1) for ctx in ranks(base, 2)]
    for part, pieces in zip((q, k, v), zip(*halves)):
        torch.testing.assert_close(part, torch.cat(pieces, -1))


def test_more_ranks_than_kv_heads_share_them(base):
    tensors = {f"{name}.weight": random(o.size, 8) for name, o in QKV.items()}
    keys = [filled(Linear(ctx, 8, QKV, shard="column"), tensors)(torch.eye(8)).split([8, 8, 8], -1)[1] for ctx in ranks(base, 4)]
    whole = tensors["k.weight"].T
    for rank, key in enumerate(keys):
        torch.testing.assert_close(key, whole[:, 8 * (rank // 2) : 8 * (rank // 2) + 8])


def test_row_shards_sum_to_the_whole_with_the_bias_once(base):
    tensors = {"weight": random(6, 8), "bias": random(6)}
    x = random(3, 8)
    whole = filled(Linear(base, 8, 6, bias=True, shard="row"), tensors)(x)
    parts = [filled(Linear(ctx, 8, 6, bias=True, shard="row"), tensors) for ctx in ranks(base, 2)]
    torch.testing.assert_close(sum(part(x[:, 4 * rank : 4 * rank + 4]) for rank, part in enumerate(parts)), whole)


def test_a_fused_tensor_fills_all_its_parts(base):
    tensors = {f"{name}.weight": random(o.size, 8) for name, o in QKV.items()}
    fused = {"q+k+v.weight": torch.cat(list(tensors.values()))}
    for ctx in (base, *ranks(base, 2)):
        one, other = (filled(Linear(ctx, 8, QKV, shard="column"), t) for t in (tensors, fused))
        assert torch.equal(one.weight, other.weight)
        assert set(other.load("q+k+v.weight", fused["q+k+v.weight"])) == set(tensors)


def test_experts_sum_to_the_whole(base):
    shape = MoEShape(num_experts=4, top_k=2, intermediate_size=6)
    sizes = {"gate": (6, 8), "up": (6, 8), "down": (8, 6)}
    tensors = {
        f"{e}.{n}.weight": torch.randn(*sizes[n], generator=torch.Generator().manual_seed(e)) for e in range(4) for n in sizes
    }
    router, x = random(4, 8), random(5, 8)

    def make(ctx):
        moe = MoE(ctx, 8, shape, "silu")
        moe.router.load("weight", router)
        moe.router.finish()
        filled(moe.experts, tensors)
        return moe(x)

    torch.testing.assert_close(sum(make(ctx) for ctx in ranks(base, 2)), make(base))


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_ranks_do_not_divide(base, tied: bool):
    table, head = random(7, 4), random(7, 4) * 2
    ids, hidden = torch.tensor([6, 0, 3, 4]), random(3, 4)
    rows, logits = 0, []
    for ctx in ranks(base, 2):
        embedding = filled(VocabEmbedding(ctx, 7, 4), {"weight": table})
        rows = rows + embedding(ids)
        made = LogitsHead(ctx, 7, 4, embedding if tied else None)
        filled(made.projection, {} if tied else {"weight": head})
        made.vocab_size = 4  # what a rank has: gathering is not done here
        logits.append(made(hidden))
    torch.testing.assert_close(rows, table[ids])
    torch.testing.assert_close(torch.cat(logits, -1)[:, :7], hidden @ (table if tied else head).T)


@pytest.mark.parametrize("units, world_size", [(3, 2), (6, 4), (4, 6)])
def test_heads_that_cannot_be_shared_are_refused(units: int, world_size: int):
    with pytest.raises(ConfigError, match=f"{units} heads.*{world_size} ranks"):
        shard_units(units, 0, world_size)


def test_a_part_that_the_layer_lacks_and_a_wrong_shape_are_refused(base):
    layer = Linear(base, 8, QKV, shard="column")
    with pytest.raises(UnknownPart):
        layer.load("q.bias", random(32))
    with pytest.raises(ConfigError, match=r"shape \(31, 8\).*32 rows"):
        layer.load("q.weight", random(31, 8))
    with pytest.raises(ConfigError, match=r"shape \(32, 7\).*\(32, 8\)"):
        layer.load("q.weight", random(32, 7))
