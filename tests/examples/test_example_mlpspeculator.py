"""examples/09 as a user runs it: two speeds, one text."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "09_mlpspeculator.py"


@pytest.mark.parametrize("options", [[], pytest.param(["--tree"], marks=pytest.mark.slow)])
def test_the_speculator_changes_the_time_and_not_the_text(options):
    done = subprocess.run([sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"(?:Without speculation|With the speculator): 0\.\d+ seconds per token", done.stdout)) == 2
    assert "os.path.join: Join two or more" in done.stdout
    assert "Generated texts are the same: True" in done.stdout
