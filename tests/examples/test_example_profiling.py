"""The examples of profiling run as a user would run them, and leave what they promise."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_tables_and_files_of_a_batch_whose_requests_end_one_after_the_other(tmp_path):
    files = ["--csv", str(tmp_path / "x"), "--json", str(tmp_path / "x.json"), "--save-chrome-traces-folder", str(tmp_path / "t")]
    printed = run("30_profiling.py", "run_to_completion", "-n", "2", "--prompt-len", "8", *files)
    assert "prefill: 1 steps, 32 tokens" in printed and "decode: 3 steps, 7 tokens" in printed  # 4, 2, 1 requests
    steps = json.loads((tmp_path / "x.json").read_text())
    seen = {name: step["metadata"]["num_running_seqs"] for name, step in steps.items() if name != "context"}
    assert seen == {"prefill": 4, "decode_1": 4, "decode_2": 2, "decode_3": 1}
    assert sorted(path.stem for path in (tmp_path / "t").iterdir()) == sorted(seen)
    assert len(list(tmp_path.glob("x_*_table.csv"))) == 4


@pytest.mark.slow
def test_one_trace_of_what_ran_between_start_and_stop(tmp_path):
    printed = run("31_simple_profiling.py", "--directory", str(tmp_path))
    assert printed.count("Prompt: ") == 4
    written = [Path(line.removeprefix("Wrote ")) for line in printed.splitlines() if line.startswith("Wrote ")]
    assert sorted(written) == sorted(tmp_path.iterdir())
    (trace,) = (path for path in written if path.name.endswith(".json.gz"))
    assert any(event["name"].startswith("step: ") for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])
