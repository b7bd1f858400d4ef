"""`kernel bench serve`: arrivals and lengths as promised, figures by hand, and a real server under load."""

import json
import math
import statistics
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import httpx
import pytest
from kernel_bench.latency_report import latencies, picture, report
from kernel_bench.sending import Answered
from kernel_bench.serving import read_goals
from kernel_bench.traffic import MIXES, Mix, Shape, read_prompts

from kernel_core.api import RequestError
from kernel_core.cli import main


def test_requests_come_as_a_poisson_process_with_log_normal_lengths():
    planned = Shape(4000, MIXES["chat"], rate=20.0, seed=1).make()
    assert planned == Shape(4000, MIXES["chat"], rate=20.0, seed=1).make() != Shape(4000, MIXES["chat"], rate=20.0).make()
    gaps = [b.at - a.at for a, b in pairwise(planned)]
    assert math.isclose(statistics.mean(gaps), 1 / 20, rel_tol=0.06)
    assert math.isclose(statistics.stdev(gaps), 1 / 20, rel_tol=0.06)  # of an exponential law it is the mean
    lengths = [len(plan.prompt.split()) for plan in planned]
    assert math.isclose(statistics.mean(lengths), 160, rel_tol=0.06) and statistics.median(lengths) < 0.75 * 160
    bursty = Shape(4000, MIXES["chat"], rate=20.0, burstiness=0.25).make()
    gaps = [b.at - a.at for a, b in pairwise(bursty)]
    assert math.isclose(statistics.mean(gaps), 1 / 20, rel_tol=0.15) and statistics.stdev(gaps) > 1.6 / 20


def test_prefixes_are_shared_in_groups_and_a_closed_loop_has_no_times():
    planned = Shape(60, MIXES["chat"], prefix=30, groups=3).make()
    assert len({" ".join(plan.prompt.split()[:30]) for plan in planned}) == 3
    assert len({plan.prompt for plan in planned}) == 60 and all(plan.at is None for plan in planned)


def test_prompts_are_read_from_both_kinds_of_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"turns": ["b", "c"]}\n')
    assert read_prompts(path) == ["a", "b"]


def test_figures_are_those_of_a_calculation_by_hand():
    first = Answered(1.0, 0.0, [1.5, 1.7, 2.1], 2.2, 10, 4)
    second = Answered(2.0, 0.1, [4.0], 4.0, 20, 1)
    third = Answered(0.0, error="status 429: busy", ended=0.1)
    found = latencies(first)
    assert math.isclose(found["ttft"], 0.5) and math.isclose(found["tpot"], 0.2) and math.isclose(found["e2e"], 1.2)
    made = report([first, second, third], {"ttft": 1.0})
    assert (made["requests"], made["failed"], made["seconds"]) == (3, 1, 4.0)
    assert made["output_tokens_per_s"] == 1.25 and made["prompt_tokens"] == 30 and made["errors"] == ["status 429: busy"]
    assert made["goodput"]["share"] == round(1 / 3, 4) and made["goodput"]["requests_per_s"] == 0.25
    assert made["latency_ms"]["ttft"]["p50"] == 1250 and made["latency_ms"]["itl"]["mean"] == 300
    assert made["latency_ms"]["tpot"] == {"mean": 200.0, "p50": 200.0, "p90": 200.0, "p95": 200.0, "p99": 200.0}
    drawing = ElementTree.fromstring(picture([first, second, third], "a <title> & more"))
    assert len(drawing.findall(".//{*}polyline")) == 4
    assert report([third], {})["latency_ms"]["ttft"] == {} and ElementTree.fromstring(picture([third], "")) is not None


@pytest.mark.parametrize("goal", ["ttft", "ttft=", "speed=1", "e2e=-1", "tpot=nan"])
def test_a_goal_that_is_none_is_refused(goal):
    with pytest.raises(RequestError, match="give NAME=SECONDS"):
        read_goals([goal])


def test_a_server_under_load_open_and_closed(start_server, byte_model, tmp_path, capsys):
    server = start_server(model=byte_model)
    plot, output = tmp_path / "load.svg", tmp_path / "load.json"
    shape = ["--prompt-len", "4", "--output-len", "6", "--longest", "8", "--spread", "0.5", "--url", f"{server.url}/v1"]
    files = ["--plot", str(plot), "--output", str(output), "--goal", "e2e=100"]
    assert main(["bench", "serve", "--requests", "24", "--concurrency", "8", "--json", *shape, *files]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(output.read_text()) and printed["failed"] == 0 and printed["goodput"]["share"] == 1
    planned = Shape(24, Mix("", 4, 6, 0.5), longest=8).make()
    assert printed["output_tokens"] == sum(plan.max_tokens for plan in planned)
    assert printed["latency_ms"]["ttft"]["p50"] <= printed["latency_ms"]["e2e"]["p50"]
    assert ElementTree.parse(plot).getroot().tag.endswith("svg")
    assert main(["bench", "serve", "--requests", "10", "--rate", "50", "--api", "completions", *shape]) == 0
    said = capsys.readouterr().out
    assert "10 requests of the mix chat, 50 requests/s" in said and "failed                   0" in said
    assert httpx.get(f"{server.url}/load").json()["unfinished"] == 0


def test_without_a_server_the_error_says_what_to_do(capsys):
    assert main(["bench", "serve", "--url", "http://127.0.0.1:9"]) == 2
    assert "no OpenAI-compatible server answers" in capsys.readouterr().err
