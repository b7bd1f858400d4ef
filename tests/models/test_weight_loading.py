"""From checkpoint to model: nothing missing, nothing ignored, nothing copied, formats before wrappers before weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from dense_harness import NoHooks, Session, load, ragged_logits
from model_references import CASES, prompts, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from kernel_core.errors import ConfigError
from kernel_core.nn.layers import Linear, TiedHead
from kernel_core.nn.loading import NameMap
from kernel_core.nn.ops import Ops

PROMPTS = prompts(5, 2)


def same(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def rewrite(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def add(tensors: dict) -> None:
    tensors["model.layers.0.self_attn.q_proj.weight_scale"] = torch.ones(1)
    tensors["vision.patch.weight"] = torch.ones(1)


def remove(tensors: dict) -> None:
    del tensors["model.layers.1.self_attn.k_proj.weight"]


def cut(tensors: dict) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"][:, :5].contiguous()


def inverse_frequencies(tensors: dict) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)


@pytest.mark.parametrize(
    "change, message",
    [
        (add, r"2 are not part of the model: .*q_proj\.weight_scale.*vision\.patch\.weight"),
        (remove, r"1 tensors are missing: layers\.1\.attention\.qkv \(k\.weight\)"),
        (cut, r"model\.layers\.1\.mlp\.down_proj\.weight' does not fit.*\(64, 5\).*\(64, 96\)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path, change, message: str):
    write_checkpoint(tmp_path, "llama", {})
    rewrite(tmp_path, change)
    with pytest.raises(ConfigError, match=message):
        load(str(tmp_path))


def test_tensors_known_to_be_needless_are_left_out(tmp_path):
    write_checkpoint(tmp_path, "llama", {})
    want = ragged_logits(load(str(tmp_path)), PROMPTS, 9)
    rewrite(tmp_path, inverse_frequencies)
    assert same(ragged_logits(load(str(tmp_path)), PROMPTS, 9), want)


def test_shards_with_an_index_load_the_same(tmp_path, checkpoint):
    path, _ = checkpoint("llama")
    write_checkpoint(tmp_path, *CASES["llama"], max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same(ragged_logits(load(str(tmp_path)), PROMPTS, 9), ragged_logits(load(path), PROMPTS, 9))
    index = tmp_path / "model.safetensors.index.json"
    lost = sorted(set(json.loads(index.read_text())["weight_map"].values()))[0]
    (tmp_path / lost).unlink()
    with pytest.raises(ConfigError, match=lost):
        load(str(tmp_path))


def mapped(tensor: torch.Tensor, file: str) -> bool:
    """Whether a tensor's memory is a mapping of the file."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(part, 16) for part in line.split()[0].split("-"))
        if begin <= address < end:
            return line.endswith(file)
    return False


def test_whole_tensors_are_used_where_the_file_is_mapped(checkpoint):
    path, _ = checkpoint("llama-tied-bias")
    model = load(path)
    assert mapped(model.embedding.weight, "model.safetensors")
    assert mapped(model.layers[0].mlp.down.weight, "model.safetensors")
    assert not mapped(model.layers[0].attention.qkv.weight, "model.safetensors")  # fused from three
    phi, _ = checkpoint("phi3")
    assert mapped(load(phi).layers[0].attention.qkv.weight, "model.safetensors")  # stored fused


class Packed:
    """Lays weights out transposed, and lets the plain ones go."""

    keeps_weight = False

    def prepare(self, weight, bias):
        return weight.T.contiguous(), bias

    def __call__(self, x, state):
        return x @ state[0] + (0 if state[1] is None else state[1])

    def rows(self, state, ids):
        return state[0][:, ids].T


class PackedWithoutRows(Packed):
    rows = None


@pytest.mark.parametrize("packed", [Packed(), PackedWithoutRows()], ids=["rows", "no-rows"])
def test_a_device_may_lay_weights_out_and_drop_the_plain_ones(checkpoint, packed):
    path, _ = checkpoint("llama-tied-bias")
    ops = Ops()
    ops.register("linear", packed, owner="test", predicate=lambda facts: facts["format"] == "plain")
    model = load(path, ops=ops)
    linears = [m for m in model.modules() if isinstance(m, Linear)]
    assert len(linears) == 8 and all(m.weight.is_meta for m in linears)
    assert model.embedding.weight.is_meta == (packed.rows is not None)
    for got, want in zip(ragged_logits(model, PROMPTS, 9), ragged_logits(load(path), PROMPTS, 9)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("packed", [True, False])
def test_a_live_update_is_the_same_stream_again(tmp_path, checkpoint, packed: bool):
    path, _ = checkpoint("llama-tied-bias")
    ops = Ops()
    if packed:
        ops.register("linear", Packed(), owner="test")
    model = load(path, ops=ops)
    write_checkpoint(tmp_path, *CASES["llama-tied-bias"])
    rewrite(tmp_path, lambda tensors: [tensor.mul_(0.9) for tensor in tensors.values()])
    model.loader.load(load_file(tmp_path / "model.safetensors").items())
    for got, want in zip(ragged_logits(model, PROMPTS, 9), ragged_logits(load(str(tmp_path)), PROMPTS, 9)):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert packed or not mapped(model.layers[0].mlp.gate_up.weight, "model.safetensors")


def test_a_live_update_may_leave_layers_out_but_not_halves_of_them(checkpoint):
    path, _ = checkpoint("llama")
    model, tensors = load(path), load_file(Path(path) / "model.safetensors")
    down = "model.layers.1.mlp.down_proj.weight"
    model.loader.load([(down, tensors[down] * 0)])
    assert not model.layers[1].mlp.down.weight.any() and model.layers[0].mlp.down.weight.any()
    key = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(ConfigError, match=r"2 tensors are missing: .*qkv \(q\.weight\), .*qkv \(v\.weight\)"):
        model.loader.load([(key, tensors[key])])


class HalfFormat:
    """Keeps "down" linears as int8."""

    format = "int8"

    def replace(self, path, linear):
        if path.endswith("mlp.down"):
            assert linear.weight.is_meta
            linear.format = "int8"
            return linear
        return None


class Doubled(nn.Module):
    def __init__(self, inner, log):
        super().__init__()
        self.inner, self.log = inner, log

    def forward(self, x):
        return 2 * self.inner(x)

    def finish(self):
        self.log.append(self.inner.weight.is_meta)


def test_formats_then_wrappers_in_order_then_weights(checkpoint):
    path, _ = checkpoint("llama")
    seen, finished = [], []

    def first(path, module):
        seen.append((path, getattr(module, "format", None), type(module).__name__))
        return Doubled(module, finished) if path == "layers.0.mlp.down" else None

    def second(path, module):
        seen.append((path, None, type(module).__name__))

    model = load(path, NoHooks({"make_weight_format": [HalfFormat()], "wrap_module": [first, second]}))
    assert ("layers.0.mlp.down", "int8", "Linear") in seen
    assert ("layers.0.mlp.down", None, "Doubled") in seen
    assert {"embedding", "layers.1.attention.qkv", "head.projection"} <= {path for path, *_ in seen}
    assert finished == [True]  # the wrapper is told when all weights are there: int8 has let go of the plain one
    down, plain = model.layers[0].mlp.down, load(path).layers[0].mlp.down
    x = torch.randn(2, 96)
    torch.testing.assert_close(down(x), 2 * plain(x), atol=0.2, rtol=0.02)


def test_random_weights_are_seeded_and_read_nothing(tmp_path, checkpoint):
    path, _ = checkpoint("qwen3-moe")
    (tmp_path / "config.json").write_text((Path(path) / "config.json").read_text())
    one, other = (ragged_logits(load(str(tmp_path), random_weights=True), PROMPTS, 9) for _ in range(2))
    assert same(one, other)
    assert all(logits.isfinite().all() and logits.std() > 0 for logits in one)


def test_a_tied_head_may_be_stored_a_second_time(tmp_path):
    write_checkpoint(tmp_path, *CASES["qwen2"])
    want = ragged_logits(load(str(tmp_path)), PROMPTS, 9)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(160, 64)}))
    model = load(str(tmp_path))
    assert isinstance(model.head.projection, TiedHead)
    assert same(ragged_logits(model, PROMPTS, 9), want)


def test_spans_take_the_place_of_embeddings(checkpoint):
    path, _ = checkpoint("llama")
    model = load(path)
    session, tokens = Session(model), torch.tensor(PROMPTS[0])
    want = session.feed({0: PROMPTS[0]})[0]
    fwd = session.forward
    fwd.kv = {layer: {} for layer in session.layers}
    fwd.embeds, fwd.embeds_mask = model.embed(tokens), torch.tensor([False, True, True, False, True])
    fwd.token_ids = tokens.where(~fwd.embeds_mask, 0)
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(fwd)), want)


NAMES = NameMap(
    {
        "model.layers.*.q_proj": "layers.*.qkv:q",
        "model.layers.*.experts.*.w1": "layers.*.experts:*.gate",
        "model.layers.*.experts.all": "layers.*.experts:gate+up",
        "model.norm": "norm",
        "model.rotary.inv_freq": None,
    }
)


@pytest.mark.parametrize(
    "name, found",
    [
        ("model.layers.12.q_proj.weight", ("layers.12.qkv", "q.weight")),
        ("model.layers.3.experts.7.w1.weight", ("layers.3.experts", "7.gate.weight")),
        ("model.layers.3.experts.all", ("layers.3.experts", "gate+up")),
        ("model.norm.weight", ("norm", "weight")),
        ("model.rotary.inv_freq", None),
    ],
)
def test_name_map(name: str, found):
    assert NAMES.find(name) == found


def test_name_map_knows_what_it_does_not_know():
    with pytest.raises(LookupError, match=r"model\.q"):
        NAMES.find("model.q")
    assert NameMap({"**": ""}).find("a.0.weight") == ("", "a.0.weight")
