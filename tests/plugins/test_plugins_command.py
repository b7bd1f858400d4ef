"""`kernel plugins --explain ops` on a real model: what each op and each attention layer got."""

from __future__ import annotations

import json

import pytest

from kernel_core import cli


@pytest.mark.slow
def test_explain_ops_names_the_owner_of_every_choice(byte_model, capsys):
    """The table says the same as the JSON."""
    arguments = ["plugins", "--explain", "ops", "--model", str(byte_model), "--set", "engine.max_requests=2"]
    assert cli.main([*arguments, "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)
    owners = {op: owner for op, owner, _ in chosen["ops"]}
    assert {"embedding", "linear", "rms_norm", "rotary"} <= owners.keys() and all(owners.values())
    assert len(chosen["attention"]) == 2
    assert cli.main(arguments) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert all(["linear", owner] == row[:2] for op, owner, _ in chosen["ops"] for row in rows if op == "linear" == row[0])
    assert ["attention", *set(chosen["attention"].values()), "2", "layers"] in rows
