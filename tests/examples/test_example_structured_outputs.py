"""The example of structured outputs runs as a user would run it; it checks what it prints."""

import subprocess
import sys
from pathlib import Path


def test_four_kinds_of_constraints_hold():
    script = Path(__file__).parents[2] / "examples" / "24_structured_outputs.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert "choice: 'Positive'" in done.stdout or "choice: 'Negative'" in done.stdout
    assert "All four are valid." in done.stdout
