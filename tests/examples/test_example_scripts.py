"""The numbered examples run as a user would run them, and print what they promise."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_basic_answers_every_prompt_in_order_and_every_conversation():
    printed = run("01_basic.py", "--max-model-len", "512")
    assert printed.count("Prompt:") == 4 + 1 + 10
    assert "512 tokens at once" in printed
    assert printed.count("Join two or more") == 3  # one conversation, and twice among the ten


def test_the_engine_driven_by_hand_finishes_three_overlapping_requests():
    printed = run("02_llm_engine.py")
    assert [printed.count(f"request {n}: '") for n in range(3)] == [1, 1, 1]
    assert "  [1] " in printed
    assert "prompt logprobs of request 0: None, Logprob(" in printed


def test_two_runs_print_the_same_random_text():
    first, second = run("34_reproducibility.py"), run("34_reproducibility.py")
    assert first == second
    assert "The same alone and in company: True" in first


def test_answers_are_the_same_with_and_without_prefix_caching():
    printed = run("06_prefix_caching.py")
    assert "Generated answers are the same: True" in printed
    assert printed.count(" (0 of ") == 4  # without; with it, none


def test_the_second_question_about_a_table_finds_the_table_cached():
    found = re.findall(r"(\d+) of (\d+) prompt tokens cached", run("07_automatic_prefix_caching.py"))
    (_, _), (cached, prompt) = ((int(a), int(b)) for a, b in found)
    assert cached > 0.9 * prompt
