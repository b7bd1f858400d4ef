"""The choice among implementations of an op, and the references where no family's logits would show a mistake."""

from __future__ import annotations

import pytest
import torch

from kernel_core.errors import PluginError
from kernel_core.nn.ops import REFERENCE, Int8Linear, Ops, keeps_weight, prepare


def test_the_highest_priority_that_fits_is_chosen_once():
    ops, asked = Ops(), []

    def fits_bf16(facts):
        asked.append(facts["dtype"])
        return facts["dtype"] is torch.bfloat16

    ops.register("silu_mul", lambda x: "plain", owner="first")
    ops.register("silu_mul", lambda x: "same", owner="second")
    ops.register("silu_mul", lambda x: "fast", owner="device", priority=5, predicate=fits_bf16)
    assert ops.resolve("silu_mul", dtype=torch.bfloat16)(None) == "fast"
    assert ops.resolve("silu_mul", dtype=torch.float32)(None) == "plain"
    ops.resolve("silu_mul", dtype=torch.bfloat16)
    assert asked == [torch.bfloat16, torch.float32]
    assert ops.explain() == [("silu_mul", "device", "dtype=bfloat16"), ("silu_mul", "first", "dtype=float32")]


def test_a_device_comes_before_the_reference_and_a_misfit_falls_back_to_it():
    ops = Ops()
    ops.register("relu", abs, owner="device", predicate=lambda facts: facts["size"] > 4)
    assert ops.resolve("relu", size=8) is abs
    assert ops.resolve("relu", size=2) is torch.nn.functional.relu
    assert [owner for _, owner, _ in ops.explain()] == ["device", REFERENCE]


def test_what_is_registered_later_counts_for_later_choices():
    ops = Ops()
    ops.resolve("relu", size=1)
    ops.register("relu", abs, owner="device")
    assert ops.resolve("relu", size=1) is abs


@pytest.mark.parametrize("name, facts", [("nothing", {}), ("linear", {"format": "fp3"}), ("all_reduce", {"world_size": 2})])
def test_no_fitting_implementation_is_an_error_that_names_the_site(name: str, facts: dict):
    with pytest.raises(PluginError, match=f"'{name}'.*{next(iter(facts), '')}"):
        Ops().resolve(name, **facts)


@pytest.mark.parametrize("bias", [True, False])
def test_int8_keeps_each_output_channel_within_half_a_step(bias: bool):
    torch.manual_seed(0)
    weight = torch.randn(6, 32) * torch.tensor([1e-3, 1, 5, 0, 2, 1])[:, None]
    op, x, shift = Int8Linear(), torch.randn(4, 32), torch.randn(6) if bias else None
    state = prepare(op, weight, shift)
    assert not keeps_weight(op)
    assert state[0].dtype is torch.int8 and (state[0].abs().amax(1) == torch.tensor([127, 127, 127, 0, 127, 127])).all()
    step = weight.abs().amax(1) / 127
    exact = x @ weight.T + (0 if shift is None else shift)
    assert ((op(x, state) - exact).abs() <= x.abs().sum(1, keepdim=True) * step / 2 + 1e-5).all()


def test_plain_functions_get_their_weights_as_state():
    op = Ops().resolve("linear", format="plain")
    weight, bias, x = torch.randn(3, 4), torch.randn(3), torch.randn(2, 4)
    assert keeps_weight(op)
    torch.testing.assert_close(op(x, prepare(op, weight, bias)), x @ weight.T + bias)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_pairs_as_complex_numbers(interleaved: bool):
    torch.manual_seed(0)
    rot, dim, angle = 6, 8, torch.rand(5, 3)
    q, k, positions = torch.randn(4, 2, dim), torch.randn(4, 1, dim), torch.tensor([3, 0, 4, 4])
    op = Ops().resolve("rotary", interleaved=interleaved)
    for x, y in zip((q, k), op(q.clone(), k.clone(), angle.cos(), angle.sin(), positions)):
        assert y.shape == x.shape and torch.equal(y[..., rot:], x[..., rot:])
        first, second = (x[..., :rot:2], x[..., 1:rot:2]) if interleaved else (x[..., :3], x[..., 3:rot])
        turned = torch.complex(first, second) * torch.polar(torch.ones(4, 1, 3), angle[positions][:, None])
        got = (y[..., :rot:2], y[..., 1:rot:2]) if interleaved else (y[..., :3], y[..., 3:rot])
        torch.testing.assert_close(torch.complex(*got), turned)


@pytest.mark.parametrize("offset", [0, 1])
def test_rms_norm_adds_the_residual_first(offset: int):
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    y, total = Ops().resolve("rms_norm")(x, weight, 1e-5, residual, offset)
    assert torch.equal(total, x + residual)
    scale = (total.double() ** 2).mean(-1, keepdim=True).add(1e-5).rsqrt()
    torch.testing.assert_close(y, (total * scale * (weight + offset)).float())


@pytest.mark.parametrize("renormalise", [False, True])
def test_moe_is_the_weighted_sum_of_the_best_experts(renormalise: bool):
    torch.manual_seed(1)
    experts, top_k, hidden, inner = 5, 2, 6, 4
    gate_up, down = torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    x, logits = torch.randn(7, hidden), torch.randn(7, experts)
    op = Ops().resolve("moe", activation="silu", format="plain")
    got = op(x, logits, prepare(op, gate_up, down), top_k, renormalise)
    for token in range(7):
        share = logits[token].softmax(-1)
        best = share.argsort(descending=True)[:top_k]
        weights = share[best] / (share[best].sum() if renormalise else 1)
        want = torch.zeros(hidden)
        for weight, expert in zip(weights, best):
            gate, up = (gate_up[expert] @ x[token]).split(inner)
            want += weight * (down[expert] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(got[token], want)
