"""The commands generate, chat and bench, from the program's arguments to what they print."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kernel_core.cli import main


@pytest.fixture
def kernel(byte_model, capsys, monkeypatch):
    """Run `kernel ...` in this process → (exit code, stdout, stderr)."""

    def run(*arguments: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main([arguments[0], *arguments[1:], "--model", str(byte_model), "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def objects(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# ---- generate --------------------------------------------------------------------------------------------------------


def test_json_has_one_object_a_prompt_in_order(kernel):
    code, out, err = kernel(
        "generate", "Hello", "The capital of France", "--json", "--max-tokens", "5", "--ignore-eos", "--stats"
    )
    first, second = objects(out)
    assert code == 0 and [first["prompt"], second["prompt"]] == ["Hello", "The capital of France"]
    assert len(first["token_ids"]) == 5 and first["finish_reason"] == "length" and first["stop_reason"] is None
    assert (first["num_prompt_tokens"], first["num_cached_tokens"]) == (5, 0)
    assert 0 <= first["timings"]["first_token"] <= first["timings"]["finished"] < 60
    assert "tokens/s, time to first token" in err and "KV for" in err


def test_a_single_prompt_prints_its_text_alone(kernel):
    _, out, _ = kernel("generate", "Hello", "--max-tokens", "8")
    _, lines, _ = kernel("generate", "Hello", "--max-tokens", "8", "--json")
    assert out == objects(lines)[0]["text"] + "\n"


def test_prompts_come_from_a_file_or_standard_input_one_a_line(kernel, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    for given, stdin in ((["--file", str(file)], ""), (["--file", "-"], "one\ntwo"), (["-"], "one\ntwo"), ([], "one\ntwo\n")):
        _, out, _ = kernel("generate", *given, "--json", "--max-tokens", "2", stdin=stdin)
        assert [line["prompt"] for line in objects(out)] == ["one", "two"]
    _, out, _ = kernel("generate", "--whole", "--json", "--max-tokens", "2", stdin="one\ntwo\n")
    assert [line["prompt"] for line in objects(out)] == ["one\ntwo\n"]


def test_chat_sends_each_prompt_through_the_template(kernel, tmp_path):
    _, chat, _ = kernel("generate", "--chat", "Hello", "--system", "Be kind", "--json", "--max-tokens", "6")
    _, plain, _ = kernel("generate", "[system]Be kind[user]Hello[assistant]", "--json", "--max-tokens", "6")
    (chat,), (plain,) = objects(chat), objects(plain)
    assert chat["prompt"] == "Hello" and chat["token_ids"] == plain["token_ids"]
    template = tmp_path / "template.jinja"
    template.write_text("<{{ messages[0].content }}>")
    _, own, _ = kernel("generate", "--chat", "Hello", "--chat-template", str(template), "--json", "--max-tokens", "6")
    _, plain, _ = kernel("generate", "<Hello>", "--json", "--max-tokens", "6")
    assert objects(own)[0]["token_ids"] == objects(plain)[0]["token_ids"]


def test_sampling_options_and_any_other_field_reach_the_sampler(kernel):
    options = ["--temperature", "1.2", "--seed", "3", "--n", "2", "--max-tokens", "4", "--json"]
    _, out, _ = kernel("generate", "Hello", *options, "--param", "logprobs=1", "--param", 'logit_bias={"65": 100}')
    first, second = objects(out)
    assert (first["index"], second["index"]) == (0, 1) and first["token_ids"] == [65] * 4
    assert set(first["logprobs"][0]) >= {"65"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "x" * 300], "max_model_len is 256"),
        (["generate", "a", "--file", "b"], "not both"),
        (["generate", "a", "--system", "b"], "need --chat"),
        (["generate", "--file", "/nowhere"], "cannot read /nowhere"),
        (["generate"], "standard input has no prompt"),
        (["generate", "a", "--param", "x"], "write NAME=VALUE"),
        (["generate", "a", "--param", "temprature=1"], "did you mean 'temperature'"),
        (["generate", "a", "--set", "engine.max_model_le=5"], "max_model_len"),
        (["generate", "a", "--top-p", "2"], "top_p must be in"),
        (["bench", "run", "--workload", "z"], "there is no workload 'z'; there are a, b, c"),
        (["chat", "--n", "2"], "leave --n out"),
    ],
)
def test_what_cannot_be_is_said_in_one_message_with_exit_code_2(kernel, arguments, message):
    code, out, err = kernel(*arguments)
    assert code == 2 and out == "" and message in err and "Traceback" not in err


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_a_conversation_remembers_until_it_is_cleared(kernel):
    lines = "Hello\nMore\n/clear\nHello\n/nothing\n/quit\nnever\n"
    options = ["--max-tokens", "4", "--param", "allowed_token_ids=[64, 65, 66, 67, 68, 69, 70, 71, 72]"]
    code, out, _ = kernel("chat", *options, stdin=lines)
    assert code == 0 and "there is no /nothing" in out

    def answer(prompt: str) -> str:
        _, text, _ = kernel("generate", prompt, *options, "--json")
        return objects(text)[0]["text"]

    first = answer("[user]Hello[assistant]")
    second = answer(f"[user]Hello[assistant]{first}[user]More[assistant]")
    printed = out.split("there is no /nothing")[0]
    assert printed.replace("\n", "") == (first + second + first).replace("\n", "")


def test_a_conversation_that_became_too_long_says_so_and_goes_on(kernel):
    code, out, _ = kernel("chat", "--max-tokens", "2", stdin="x" * 300 + "\nHello\n")
    assert code == 0 and "max_model_len is 256: /clear starts a new one" in out.replace("\n", " ").replace("  ", " ")


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_chat(byte_model):
    command = [sys.executable, "-m", "kernel_core", "chat", "--model", str(byte_model), "--device", "cpu", "--ignore-eos"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    process.stdin.write("Hello\n")
    process.stdin.flush()
    assert process.stdout.read(1)  # the answer has begun
    threading.Timer(0.05, lambda: process.send_signal(signal.SIGINT)).start()
    process.stdin.write("Hello\n/quit\n")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "stopped" in out or out


# ---- bench -----------------------------------------------------------------------------------------------------------


def test_bench_step_prints_what_a_step_costs(kernel):
    _, out, _ = kernel("bench", "step", "--running", "16", "--steps", "20", "--churn", "0.05", "--plugins", "priority", "--json")
    (result,) = objects(out)
    assert result["running"] == 16 and result["plugins"] == ["priority"]
    assert 0 < result["plan_commit_ms"] <= result["p99_ms"] and result["dispatch_us"] > 0


def test_bench_run_measures_each_workload(kernel):
    code, out, _ = kernel("bench", "run", "--quick", "--json", "--set", "engine.random_weights=true")
    (result,) = objects(out)
    assert code == 0 and list(result["workloads"]) == ["a", "b", "c"]
    for measured in result["workloads"].values():
        assert measured["output_tokens_per_s"] == pytest.approx(measured["output_tokens"] / measured["seconds"], rel=0.01)
        assert 0 < measured["ttft_median_s"] <= measured["ttft_max_s"] <= measured["seconds"]
        assert measured["foreign_cores"] >= 0 and measured["own_cores"] >= 0  # it may end within one tick of the clock
    assert result["start_seconds"] > 0 and result["peak_memory_bytes"] > 10 << 20


def test_own_load_counts_children_and_the_rest_is_foreign():
    from kernel_bench.processes import LoadMeter, tree

    meter, start = LoadMeter(), time.monotonic()
    child = subprocess.Popen([sys.executable, "-c", "import time\nwhile time.process_time() < 0.4: pass"])
    assert str(child.pid) in dict(tree())
    child.wait()
    load = meter.read()
    assert 0.35 < load.own * (time.monotonic() - start) < 2 and load.foreign >= 0
