"""examples/08 and 14 as a user runs them: the statistics of EAGLE heads, and a draft model that saves passes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *options: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "eagle3", "--print-output"],
        pytest.param(["--method", "eagle"], marks=pytest.mark.slow),
        pytest.param(["--tree", "--draft-tokens", "8"], marks=pytest.mark.slow),
    ],
)
def test_eagle_heads_are_accepted_and_counted(options):
    printed = run("08_eagle.py", *options)
    assert float(re.search(r"mean accepted length: (\d+\.\d+)", printed)[1]) > 1.8
    rates = [float(rate) for rate in re.findall(r"accepted at place \d+: (\d\.\d+)", printed)]
    assert len(rates) >= 2 and rates == sorted(rates, reverse=True)
    assert ("Join two or more" in printed) == ("--print-output" in options)


@pytest.mark.slow
def test_a_data_set_is_asked_by_its_first_turns(tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"turns": ["Hello!", "never asked"]}\n{"turns": ["What does os.getcwd do?"]}\n')
    printed = run("08_eagle.py", "--dataset", str(questions), "--print-output")
    assert "Hello!\n" in printed and "What does os.getcwd do?\n" in printed and "never asked" not in printed


def test_a_draft_model_saves_passes_and_changes_no_text():
    printed = run("14_neuron_speculation.py")
    passes = [(int(a), int(b)) for a, b in re.findall(r"(\d+) alone, (\d+) with drafts", printed)]
    assert len(passes) == 4 and sum(b for _, b in passes) < 0.7 * sum(a for a, _ in passes)
    assert "Generated texts are the same: True" in printed
