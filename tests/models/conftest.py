"""Checkpoints are written once a session."""

from __future__ import annotations

import pytest
from model_references import CASES, write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """name of a case → (path, transformers' model), written once."""
    made = {}

    def get(name: str):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            made[name] = (str(path), write_checkpoint(path, *CASES[name]))
        return made[name]

    return get
