"""examples/23 as a user runs it: the model calls a tool and answers from what it gave."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "23_chat_with_tools.py"


def test_the_model_calls_a_tool_and_answers_from_its_result():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^call [A-Za-z0-9]{9}: math\.sqrt\(\{'x': 16\}\) = 4\.0$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == "answer: The result is 4.0."
