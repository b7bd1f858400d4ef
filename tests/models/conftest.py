"""Lets the tests of this folder import their siblings; checkpoints are written once a session; tiny tensors on one thread."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """name of a case → (path, transformers' model), written once."""
    from model_references import CASES, write_checkpoint

    made = {}

    def get(name: str):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            made[name] = (str(path), write_checkpoint(path, *CASES[name]))
        return made[name]

    return get
