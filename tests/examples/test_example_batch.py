"""examples/33 as a user runs it: answers in order, an error in its place, and nothing computed twice."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "33_openai_batch.py"


def test_a_file_of_requests_is_answered_and_a_second_run_computes_nothing(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--folder", str(tmp_path)]
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=240, check=False) for _ in range(2))
    assert first.returncode == 0, first.stderr
    lines = first.stdout.splitlines()
    assert lines[0].startswith('chat-0: "Join two or more') and lines[3].startswith("completion: ")
    assert "is not JSON" in lines[4] and lines[5] == "Exit code of kernel run-batch: 1"
    assert "tiny-chat on cpu" in first.stderr and "tiny-chat on cpu" not in second.stderr
    assert second.stdout == first.stdout
