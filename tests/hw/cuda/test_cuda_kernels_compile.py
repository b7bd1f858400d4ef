"""Every kernel compiles for the GPUs that are supported, without one, and keeps to its registers."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_kernels.py"
PACKAGE = Path(__file__).parents[3] / "hw" / "cuda"
REGISTERS = 255
SPILLED = {"80": 320, "90": 144, "100": 160}  # bytes a thread: the widest prefill tiles
HOT = (
    "short decode 64",
    "short decode 128",
    "prepare",
    "combine",
    "rms_norm",
    "few_rows",
    "draw_part",
    "act_mul",
)  # spill nothing


def compiled(architecture, part=""):
    """Name → what it uses."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(
        [sys.executable, SCRIPT, architecture, part], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {row.pop("kernel"): row for row in map(json.loads, done.stdout.splitlines())}


def launched():
    """The kernels that any launch names."""
    sources = [file.read_text() for file in PACKAGE.rglob("*.py")]
    kernels = {name for source in sources for name in re.findall(r"@triton\.jit.*?\ndef (\w+)\(", source)}
    return {name.lstrip("_") for source in sources for name in re.findall(r"(\w+)\[(?:\(|grid\])", source) if name in kernels}


def check(used, architecture):
    for name, row in used.items():
        assert row["registers"] <= REGISTERS, name
        assert row["spilled"] <= (8 if name.startswith(HOT) else SPILLED[architecture]), (name, row)
        assert row["shared"] <= 160 << 10, (name, row)  # what sm_80 has


def test_decoding_on_hopper():
    used = compiled("90", "short decode 128")
    assert used
    check(used, "90")
    assert used["short decode 128"]["registers"] <= 128  # four programs of 128 threads to a multiprocessor


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_all(architecture):
    used = compiled(architecture)
    check(used, architecture)
    left_out = launched() - {name.split()[0] for name in used}
    assert left_out == ({"quantise_rows"} if architecture == "80" else set())  # which has no e4m3 numbers
