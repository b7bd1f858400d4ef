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
SPILLED = {"80": 320, "86": 320, "90": 128, "100": 160, "120": 352}  # bytes a thread: the widest prefill tiles
WIDEST = 640  # heads of 256 that are decoded from e4m3
RARE, RAREST = "short verify float32", 3 << 10  # 64 rows of float32 heads of 256 on sm_86: slow, but they run
SHARED = {"80": 160 << 10, "86": 99 << 10, "90": 160 << 10, "100": 160 << 10, "120": 99 << 10}
DEEP, DEEPEST = ("few_rows e4m3 64", "few_rows int8 64"), 227 << 10  # what sm_90 and sm_100 have
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
        is_hot = name.startswith(HOT) and "float32" not in name
        limit = 8 if is_hot else WIDEST if name == "long prefill e4m3" else SPILLED[architecture]
        limit = RAREST if name.startswith(RARE) and architecture == "86" else limit
        assert row["spilled"] <= limit, (name, row)
        assert row["shared"] <= (DEEPEST if name in DEEP and architecture in ("90", "100") else SHARED[architecture]), (name, row)


def test_decoding_on_hopper():
    used = compiled("90", "short decode 128")
    assert used
    check(used, "90")
    assert used["short decode 128"]["registers"] <= 128  # four programs of 128 threads to a multiprocessor


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["80", "86", "90", "100", "120"])
def test_all(architecture):
    used = compiled(architecture)
    assert len(used) > 30
    check(used, architecture)
    left_out = launched() - {name.split()[0] for name in used}
    assert left_out == ({"quantise_rows"} if architecture in ("80", "86") else set())  # which has no e4m3 numbers
