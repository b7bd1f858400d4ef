"""Every family's model gives transformers' logits within 1e-4, for prompts of mixed lengths fed together in chunks."""

from __future__ import annotations

import pytest
import torch
from dense_harness import load, ragged_logits
from model_references import CASES, LONGROPE, edit_config, prompts, reference_logits, write_checkpoint

PROMPTS = prompts(1, 13, 4, 30)


def expect(model, reference, given=PROMPTS, chunk=9) -> None:
    for prompt, logits in zip(given, ragged_logits(model, given, chunk), strict=True):
        torch.testing.assert_close(logits, reference_logits(reference, prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_logits(checkpoint, name: str):
    path, reference = checkpoint(name)
    expect(load(path), reference)


@pytest.mark.parametrize("length, lengths", [(32, (3, 32)), (128, (33, 90))], ids=["short", "long"])
def test_longrope_follows_the_length_of_the_engine(tmp_path, length: int, lengths: tuple[int, ...]):
    """Short factors where no request can pass the original length, long ones otherwise."""
    changes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
    reference = write_checkpoint(tmp_path, "phi3", changes)
    given = prompts(*lengths)
    expect(load(str(tmp_path), max_model_len=length), reference, given, chunk=max(lengths))


def test_dynamic_rope_stretches_for_the_length_of_the_engine(tmp_path):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 3.0}
    reference = write_checkpoint(tmp_path, "llama", {"rope_parameters": rope, "max_position_embeddings": 16})
    expect(load(str(tmp_path)), reference, prompts(3, 16), chunk=16)
    expect(load(str(tmp_path), max_model_len=50), reference, prompts(50), chunk=50)


OLD_SPELLING = {
    "llama-llama3": {"rope_theta": 10000.0, "rope_scaling": {**CASES["llama-llama3"][1]["rope_parameters"], "rope_theta": None}},
    "llama-linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "phi3-longrope": {"rope_theta": 10000.0, "rope_scaling": {**LONGROPE, "type": "su", "rope_type": None, "rope_theta": None}},
    "gemma3": {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0},
}


@pytest.mark.parametrize("name", OLD_SPELLING)
def test_config_json_in_its_old_spelling(tmp_path, name: str):
    """`rope_theta` and `rope_scaling` at the top level instead of `rope_parameters`."""
    reference = write_checkpoint(tmp_path, *CASES[name])
    edit_config(str(tmp_path), rope_parameters=None, **OLD_SPELLING[name])
    expect(load(str(tmp_path)), reference)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_stored_one_by_one_or_stacked(tmp_path, name: str):
    reference = write_checkpoint(tmp_path / "stacked", *CASES[name], save_original_format=False)
    expect(load(str(tmp_path / "stacked")), reference)


def test_taps_hold_the_hidden_states_between_layers(checkpoint):
    from dense_harness import Session

    path, reference = checkpoint("gemma2")
    session = Session(load(path, taps=("embedding", "layers.1", "norm")))
    session.feed({0: PROMPTS[1]})
    with torch.no_grad():
        states = reference(torch.tensor([PROMPTS[1]]), output_hidden_states=True).hidden_states
    taps = session.forward.taps
    assert set(taps) == {"embedding", "layers.1", "norm"}
    for name, number in {"embedding": 0, "layers.1": 2, "norm": -1}.items():
        torch.testing.assert_close(taps[name], states[number][0], atol=1e-4, rtol=0)
