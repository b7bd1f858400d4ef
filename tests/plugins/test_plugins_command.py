"""`kernel plugins --explain ops` on a real model: what each op and each attention layer got."""

from __future__ import annotations

import pytest

from kernel_core import cli


@pytest.mark.slow
def test_explain_ops_names_the_owner_of_every_choice(byte_model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["plugins", "--explain", "ops", "--model", str(byte_model), "--set", "engine.max_requests=2"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["op", "owner", "for"]
    assert {"embedding", "linear", "rms_norm", "rotary", "attention"} <= {row[0] for row in rows[1:]}
    assert all(len(row) >= 3 for row in rows)
    assert [row[2:] for row in rows if row[0] == "attention"] == [["2", "layers"]]
