"""Profiles: which modules, how often, in which steps; traces and pictures that other programs can read."""

from __future__ import annotations

import asyncio
import csv
import gzip
import json
import time
from pathlib import Path
from xml.etree import ElementTree

import httpx
import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from kernel_profiling.batch import of_steps, to_completion
from kernel_profiling.chart import html_page
from kernel_profiling.probe import EventClock
from kernel_profiling.records import Operator, Span, Step
from kernel_profiling.routes import make_router
from kernel_profiling.run import record
from kernel_profiling.tables import by_kind, model_rows, step_names, step_tree, summary_rows, to_csv
from kernel_profiling.verbs import start, stop

from kernel_core.api import LLM, AsyncEngine, RequestError
from kernel_core.cli import main

LAYER_PARTS = (
    *("", ".attention_norm", ".attention", ".attention.qkv", ".attention.out", ".mlp_norm", ".mlp", ".mlp.gate_up", ".mlp.down"),
)
MODULES = {f"layers.{layer}{part}" for layer in range(2) for part in LAYER_PARTS} | {"embedding", "norm", "head"}


def open_llm(byte_model: Path, **section: object) -> LLM:
    return LLM(str(byte_model), max_requests=8, max_tokens_per_step=64, plugins={"profiling": section})


@pytest.fixture(scope="module")
def llm(byte_model):
    with open_llm(byte_model) as opened:
        yield opened


def probes_and_hooks(llm: LLM) -> tuple[int, int]:
    """How much of a profile is in the engine's worker."""
    worker = llm.engine.core.executor._worker
    return len(worker._probes), sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in worker.model.modules())


# ---- steps and modules


def test_one_prefill_and_then_decode_steps_and_every_module_once_in_each(llm):
    profile = record(llm.engine, of_steps(3, 10, 4), "modules")
    assert [step.kind for step in profile.steps] == ["prefill", "decode", "decode", "decode"]
    assert [(step.rows, step.tokens) for step in profile.steps] == [(3, 30), (3, 3), (3, 3), (3, 3)]
    for step in profile.steps:
        paths = [span.path for span in step.spans]
        assert set(paths) >= MODULES
        assert all(paths.count(path) == 1 for path in MODULES)
    decode = {row.name: row.invocations for row in model_rows(step_tree(by_kind(profile.steps)["decode"], merge=True))}
    assert (decode["step"], decode["forward"], decode["model"], decode["layers.*"]) == (3, 3, 3, 6)


def test_a_batch_run_to_completion_loses_requests_step_by_step(llm):
    profile = record(llm.engine, to_completion(5, 8, 2), "modules")
    assert [step.rows for step in profile.steps] == [5, 5, 3, 1, 1]


def test_the_known_schedule_of_128_requests_that_retire_by_32():
    lengths = to_completion(128, 1, 32).lengths
    assert [sum(length > step for length in lengths) for step in range(max(lengths))] == [128, 128, 96, 64, 32, 1]


def test_a_prompt_in_chunks_beside_a_running_request_is_mixed(llm):
    start(llm.engine.call, "modules")
    llm.generate([[5] * 60, [7] * 30], max_tokens=2, ignore_eos=True)
    kinds = [step.kind for step in stop(llm.engine.call)[0].steps]
    assert kinds == ["prefill", "mixed", "decode"]


def test_times_nest_and_add_up_to_no_more_than_the_wall(llm):
    began = time.perf_counter()
    steps = record(llm.engine, of_steps(2, 12, 3), "modules").steps
    wall = (time.perf_counter() - began) * 1e6
    assert 0 < sum(step.cpu for step in steps) <= wall
    for step in steps:
        assert sum(step.phases.values()) <= step.cpu
        for index, span in enumerate(step.spans):
            inside = [child for child in step.spans if child.parent == index]
            assert sum(child.cpu for child in inside) <= span.cpu <= step.cpu
            assert all(span.start <= child.start and child.start + child.cpu <= span.start + span.cpu for child in inside)
    tree = step_tree(steps)
    assert tree.device == sum(step.device for step in steps)
    rows = model_rows(tree)
    assert sum(row.own_device_time_us for row in rows) == pytest.approx(tree.device)


def test_modules_are_where_their_phase_is(llm):
    tree = step_tree(record(llm.engine, of_steps(2, 12, 3), "modules").steps)
    assert set(tree.children) >= {"inputs", "forward", "sample"}
    assert set(tree.children["forward"].children) == {"model"}
    assert "head" in tree.children["sample"].children


def test_modules_are_where_their_phase_is_however_late_the_phases_begin(llm):
    class Late:
        def begin(self, plan):
            began = time.perf_counter()
            while time.perf_counter() - began < 0.02:  # longer than all phases of the step together
                pass

        def end(self, plan, started, timings): ...

    probes = llm.engine.core.executor._worker._probes
    start(llm.engine.call, "modules")
    probes.append(Late())
    llm.generate([[3] * 12], max_tokens=3, ignore_eos=True)
    probes.pop()
    tree = step_tree(stop(llm.engine.call)[0].steps)
    assert set(tree.children["forward"].children) == {"model"} and "head" in tree.children["sample"].children


def test_what_runs_before_the_phases_is_the_steps_own():
    step = made_up()
    step.lead = 100.0
    assert "model" in step_tree([step]).children


# ---- off means off


def test_nothing_is_left_when_no_profile_runs_and_answers_are_the_same(llm):
    plain = llm.generate("Hello", max_tokens=6)[0].outputs[0].token_ids
    assert probes_and_hooks(llm) == (0, 0)
    start(llm.engine.call, "modules")
    assert probes_and_hooks(llm)[0] == 1
    assert llm.generate("Hello", max_tokens=6)[0].outputs[0].token_ids == plain
    assert probes_and_hooks(llm)[1] > 0
    assert stop(llm.engine.call)[0].steps
    assert probes_and_hooks(llm) == (0, 0)


def test_a_profile_ends_by_itself_after_its_most_steps(llm):
    start(llm.engine.call, "modules", max_steps=2)
    llm.generate([3, 4, 5], max_tokens=6, ignore_eos=True)
    assert probes_and_hooks(llm) == (0, 0)
    assert len(stop(llm.engine.call)[0].steps) == 2


def test_a_probe_that_fails_is_taken_out_and_the_engine_goes_on(llm, caplog):
    class Broken:
        def begin(self, plan):
            raise ValueError("broken")

        def end(self, plan, started, timings): ...

    llm.engine.core.executor._worker._probes.append(Broken())
    assert len(llm.generate([3, 4, 5], max_tokens=4, ignore_eos=True)[0].outputs[0].token_ids) == 4
    assert probes_and_hooks(llm) == (0, 0)
    assert "Broken failed and is taken out" in caplog.text


def test_what_is_recorded_into_a_graph_has_no_time(monkeypatch):
    """Events of a capture cannot be waited for; here two modules run, the first of them while a graph is captured."""
    captured, waited = [], []

    class Event:
        def __init__(self, device, enable_timing):
            captured.append(capturing[0])

        def record(self): ...
        def synchronize(self):
            waited.append(self)

        def elapsed_time(self, other):
            return 0.25

    capturing = [True]
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    clock = EventClock(torch.device("cuda"))
    for key in (0, 1):
        clock.start(key)
        clock.stop(key)
        capturing[0] = False
    assert clock.read() == {0: 0.0, 1: 250.0} and captured == [False, False] and len(waited) == 1


# ---- start and stop


def test_start_without_a_directory_stop_without_start_and_two_starts_are_refused(llm):
    with pytest.raises(RequestError, match=r"set plugins.profiling.directory"):
        llm.start_profile()
    with pytest.raises(RequestError, match="no profile is running"):
        llm.stop_profile()
    start(llm.engine.call, "modules")
    with pytest.raises(RequestError, match="running already"):
        start(llm.engine.call, "modules")
    stop(llm.engine.call)


def test_without_the_plugin_there_is_no_start_profile(byte_model):
    with LLM(str(byte_model), max_requests=2) as llm, pytest.raises(AttributeError, match="plugin"):
        llm.start_profile()


def test_a_trace_is_valid_chrome_json_with_steps_modules_and_operators(byte_model, tmp_path):
    with open_llm(byte_model, directory=str(tmp_path / "traces")) as llm:
        llm.start_profile("run_1")
        llm.generate([[3, 4, 5, 6]], max_tokens=3, ignore_eos=True)
        files = [Path(name) for name in llm.stop_profile()]
    assert sorted(path.name for path in (tmp_path / "traces").iterdir()) == sorted(path.name for path in files)
    trace, page = files
    assert trace.name.startswith("run_1-rank0-") and trace.name.endswith(".json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    complete = [event for event in events if event.get("ph") == "X"]
    assert all(event["dur"] >= 0 and {"name", "ts", "pid", "tid"} <= event.keys() for event in complete)
    names = [event["name"] for event in complete]
    assert [names.count(f"step: {step}") for step in ("prefill, 1 rows, 4 tokens", "decode, 1 rows, 1 tokens")] == [1, 2]
    assert all(names.count(path) == 3 for path in MODULES)
    assert any(name.startswith("aten::") for name in names)
    assert "decode" in page.read_text()


@pytest.mark.parametrize("prefix", ["../up", "a/b", "/tmp/x", "x" * 65, "a b"])
def test_a_prefix_is_a_name_and_never_a_path(byte_model, tmp_path, prefix):
    with open_llm(byte_model, directory=str(tmp_path)) as llm, pytest.raises(RequestError, match="letters, digits"):
        llm.start_profile(prefix)
    assert list(tmp_path.iterdir()) == []


def test_steps_before_the_delay_are_not_in_the_trace(byte_model, tmp_path):
    with open_llm(byte_model, directory=str(tmp_path), delay_steps=2, max_steps=2) as llm:
        llm.start_profile()
        llm.generate([[3, 4, 5, 6]], max_tokens=6, ignore_eos=True)
        trace, _ = llm.stop_profile()
    events = json.loads(gzip.decompress(Path(trace).read_bytes()))["traceEvents"]
    assert sum(event.get("name", "").startswith("step: ") for event in events if event.get("ph") == "X") == 2


def test_the_routes_start_and_stop_a_profile(byte_model, tmp_path):
    async def talk() -> list[tuple[int, dict]]:
        plugins = {"profiling": {"directory": str(tmp_path)}}
        async with AsyncEngine(model=str(byte_model), max_requests=2, plugins=plugins) as engine:
            app = FastAPI()
            app.include_router(make_router(engine))

            @app.exception_handler(RequestError)
            async def refuse(request, error):
                return JSONResponse({"error": str(error)}, 400)

            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://kernel") as client:
                answers = [await client.post("/start_profile", json={"prefix": "http"})]
                answers.append(await client.post("/start_profile"))
                answers.append(await client.post("/start_profile", json={"directory": "/tmp"}))
                async for _ in engine.generate([3, 4, 5], max_tokens=3, ignore_eos=True, temperature=0.0):
                    pass
                answers.append(await client.post("/stop_profile"))
                return [(answer.status_code, answer.json()) for answer in answers]

    started, again, path, stopped = asyncio.run(talk())
    assert started == (200, {"status": "started"})
    assert again[0] == 400 and "running already" in again[1]["error"]
    assert path[0] == 422  # nobody names a path over HTTP
    assert stopped[0] == 200 and all(Path(name).parent == tmp_path and Path(name).is_file() for name in stopped[1]["files"])
    assert len(stopped[1]["files"]) == 2


def test_a_running_server_is_traced_between_start_and_stop(start_server, byte_model, tmp_path):
    directory = f"plugins.profiling.directory={tmp_path}"
    server = start_server("--set", directory, "--set", "plugins.profiling.max_steps=1000", model=byte_model)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        assert client.post("/stop_profile").status_code == 400  # none runs
        assert client.post("/start_profile", json={"prefix": "live"}).json() == {"status": "started"}
        again = client.post("/start_profile")
        assert again.status_code == 400 and "running already" in again.json()["error"]["message"]
        assert client.post("/start_profile", json={"directory": "/tmp"}).status_code == 400  # nobody names a path over HTTP
        body = {"prompt": "abc", "max_tokens": 5, "ignore_eos": True}
        assert client.post("/v1/completions", json=body).status_code == 200
        files = [Path(name) for name in client.post("/stop_profile").json()["files"]]
        assert client.post("/v1/completions", json=body).status_code == 200
    assert sorted(files) == sorted(tmp_path.iterdir()) and all(path.name.startswith("live-rank0-") for path in files)
    (trace,) = (path for path in files if path.name.endswith(".json.gz"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event.get("name", "").startswith("step: ") for event in events if event.get("ph") == "X") >= 5


# ---- the command


@pytest.fixture(scope="module")
def command(byte_model, tmp_path_factory):
    """`kernel profile` run once, with all files."""
    folder = tmp_path_factory.mktemp("profile")
    options = ["--model", str(byte_model), "--prompt-len", "8", "--batch-size", "2", "--steps", "3", "--min-percent", "0"]
    files = ["--csv", str(folder / "p"), "--json", str(folder / "p.json"), "--trace", str(folder / "t")]
    assert main(["profile", *options, *files, "--html", str(folder / "p.html"), "--warmup", "0"]) == 0
    return folder


def test_the_command_writes_tables_of_prefill_and_decode(command):
    tables = {path.name: list(csv.DictReader(path.open())) for path in command.glob("*.csv")}
    assert sorted(tables) == sorted(
        f"p_{kind}_{what}_table.csv" for kind in ("prefill", "decode") for what in ("model", "summary")
    )
    model = {row["name"]: row for row in tables["p_decode_model_table.csv"]}
    assert set(model) >= MODULES and model["layers.1.mlp.down"]["invocations"] == "2"
    assert model["layers.1.mlp.down"]["trace"] == "step > forward > model > layers.1 > layers.1.mlp"
    shares = [float(row["pct_device_time"]) for row in tables["p_prefill_summary_table.csv"]]
    assert sum(shares) == pytest.approx(100) and shares == sorted(shares, reverse=True)


def test_the_command_writes_json_and_a_trace_of_each_step(command):
    found = json.loads((command / "p.json").read_text())
    assert list(found) == ["context", "prefill", "decode_1", "decode_2"]
    assert found["prefill"]["metadata"]["num_running_seqs"] == 2 and found["prefill"]["metadata"]["num_tokens"] == 16
    assert found["decode_2"]["model_stats"][0]["name"] == "step" and found["decode_2"]["summary_stats"]
    traces = {path.stem: json.loads(path.read_text())["traceEvents"] for path in (command / "t").iterdir()}
    assert set(traces) == {"prefill", "decode_1", "decode_2"}
    for name, events in traces.items():
        steps = [event["name"] for event in events if event.get("name", "").startswith("step: ")]
        assert steps and all(step.startswith(f"step: {name.split('_')[0]}, 2 rows") for step in steps)


def test_the_picture_is_one_file_that_loads_nothing(command):
    page = (command / "p.html").read_text()
    assert "http" not in page and "<script" not in page and "src=" not in page
    charts = [ElementTree.fromstring("<svg" + part.split("</svg>")[0] + "</svg>") for part in page.split("<svg")[1:]]
    assert len(charts) == 4
    boxes = [float(box.get("width")) for box in charts[1].iter("rect")]
    assert max(boxes) == 1400 and any("forward" in (title.text or "") for title in charts[1].iter("title"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-len", "200", "--batch-size", "100", "--set", "engine.max_tokens_per_step=512"], "do not fit into one step"),
        (["--prompt-len", "2", "--batch-size", "9", "--set", "engine.max_requests=4"], "do not run at once"),
        (["--prompt-len", "250", "--steps", "20"], "engine.max_model_len is 256"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(byte_model, capsys, options, message):
    assert main(["profile", "--model", str(byte_model), *options]) == 2
    assert message in capsys.readouterr().err


# ---- tables and pictures of made-up steps


def made_up() -> Step:
    """100 µs of phases: 20 before, 70 forward with two layers of 30 and 30, 10 after; on a device that takes half of it."""
    spans = [
        Span("", "Net<b>", -1, 20, 68, 34),
        Span("layers.0", "Layer", 0, 22, 30, 15),
        Span("layers.1", "Layer", 0, 54, 30, 15),
    ]
    phases = {"inputs": 20.0, "forward": 70.0, "sample": 10.0}
    operators = [Operator("gemm", 50, 30, 4), Operator("launch", 10, 0, 9)]
    return Step("decode", 2, 2, 101, 40, phases=phases, spans=spans, operators=operators)


def test_merged_layers_are_one_row_with_all_calls_and_a_device_s_own_time_is_told_apart():
    rows = {row.name: row for row in model_rows(step_tree([made_up(), made_up()], merge=True))}
    layers = rows["layers.*"]
    assert (layers.device_time_us, layers.cpu_time_us, layers.invocations, layers.pct_device_time) == (60, 120, 4, 75)
    assert rows["model"].own_device_time_us == 8  # 2 * (34 - 15 - 15)
    assert rows["forward"].device_time_us == 68 and rows["inputs"].device_time_us == 0


def test_the_summary_counts_what_ran_on_the_device():
    assert [(row.name, row.device_time_us, row.pct_device_time, row.invocations) for row in summary_rows([made_up()])] == [
        ("gemm", 30, 100, 4)
    ]


def test_names_of_modules_are_never_markup():
    page = html_page([made_up()], "<script>x</script>")
    assert "<script>" not in page and "Net<b>" not in page and "Net&lt;b&gt;" in page


def test_names_of_steps():
    kinds = ("prefill", "decode", "mixed", "decode", "prefill")
    assert step_names([Step(kind, 1, 1) for kind in kinds]) == ["prefill", "decode_1", "mixed", "decode_2", "prefill_2"]
    assert to_csv([]) == "" and "No step ran" in html_page([], "nothing")
