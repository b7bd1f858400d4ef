"""Metrics: exact counts, the texts that Prometheus reads, HTTP counts of several processes, spans."""

import json
import math
import re
import runpy
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from kernel_metrics.exposition import text
from kernel_metrics.histogram import Histogram
from kernel_metrics.reading import Counter, Gauge, Vector
from kernel_metrics.series import SERIES
from prometheus_client.parser import text_string_to_metric_families

from kernel_core import LLM, SamplingParams
from kernel_core.testing import step_bench

ROOT = Path(__file__).parents[2]
#: what dashboards for vLLM 0.9 and later ask for
EXPECTED = [
    "num_requests_running",
    "num_requests_waiting",
    "gpu_cache_usage_perc",
    "kv_cache_usage_perc",
    "gpu_prefix_cache_queries_total",
    "gpu_prefix_cache_hits_total",
    "prefix_cache_queries_total",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "iteration_tokens_total_bucket",
    "request_max_num_generation_tokens_bucket",
    "request_params_n_bucket",
    "request_params_max_tokens_bucket",
    "time_to_first_token_seconds_bucket",
    "time_per_output_token_seconds_bucket",
    "e2e_request_latency_seconds_bucket",
    "request_queue_time_seconds_bucket",
    "request_inference_time_seconds_bucket",
    "request_prefill_time_seconds_bucket",
    "request_decode_time_seconds_bucket",
    "spec_decode_num_drafts_total",
    "inter_token_latency_seconds_bucket",
    "request_time_per_output_token_seconds_bucket",
]


def values(llm: LLM) -> dict[str, object]:
    """By name without prefix, and label where there is one of its own."""
    found = {}
    for metric in llm.get_metrics():
        own = [value for key, value in metric.labels.items() if key not in ("model_name", "engine")]
        found[" ".join([metric.name.removeprefix("kernel:"), *own])] = metric
        assert metric.labels["engine"] == "0" and metric.labels["model_name"].endswith("bytes")
    return found


def test_totals_are_those_of_the_outputs_with_preemptions_and_choices(byte_model):
    """23 blocks for 12 sequences that need up to 6 each: some are preempted, and nothing is counted twice."""
    engine = {"kv_blocks": 24, "max_model_len": 96}
    with LLM(str(byte_model), plugins={"metrics": {}, "prefix_caching": False}, engine=engine) as llm:
        sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=40, n=2)
        outputs = llm.generate([f"prompt {i} is {'long ' * i}" for i in range(6)], sampling)
        found = values(llm)
    lengths = [len(choice.token_ids) for output in outputs for choice in output.outputs]
    assert found["generation_tokens"].value == sum(lengths)
    assert found["prompt_tokens"].value == 2 * sum(len(output.prompt_token_ids) for output in outputs)
    assert found["num_preemptions"].value > 0
    assert found["request_generation_tokens"].sum == sum(lengths) and found["request_generation_tokens"].count == 12
    longest = [max(len(choice.token_ids) for choice in output.outputs) for output in outputs]
    assert found["request_max_num_generation_tokens"].sum == sum(longest)
    assert found["request_params_n"].sum == 12 and found["request_params_n"].count == 6
    assert found["request_params_max_tokens"].sum == 12 * 40
    assert found["time_to_first_token_seconds"].count == 12
    assert found["inter_token_latency_seconds"].count == sum(lengths) - 12
    ended = sum(metric.value for name, metric in found.items() if name.startswith("request_success"))
    assert ended == 12 and found["request_success length"].value == sum(n == 40 for n in lengths)
    assert isinstance(found["num_requests_running"], Gauge) and found["num_requests_running"].value == 0
    assert found["kv_cache_usage_perc"].value == 0 and found["kv_blocks 0"].value == found["kv_blocks_free 0"].value
    total, parts = found["e2e_request_latency_seconds"], ("request_queue_time_seconds", "request_inference_time_seconds")
    assert math.isclose(total.sum, sum(found[part].sum for part in parts), rel_tol=1e-6)
    inference, parts = found["request_inference_time_seconds"], ("request_prefill_time_seconds", "request_decode_time_seconds")
    assert math.isclose(inference.sum, sum(found[part].sum for part in parts), rel_tol=1e-6)


def test_hits_of_the_prefix_cache_are_those_of_the_outputs(byte_model):
    with LLM(str(byte_model), plugins={"metrics": {}}) as llm:
        prompt, sampling = "x" * 100, SamplingParams(temperature=0, max_tokens=2)
        first, second = (llm.generate(prompt, sampling)[0] for _ in range(2))
        found = values(llm)
    assert first.num_cached_tokens == 0 < second.num_cached_tokens == found["prefix_cache_hits"].value
    assert found["prefix_cache_queries"].value == 200
    assert found["prompt_tokens_by_source local_cache_hit"].value == second.num_cached_tokens


def test_drafts_are_counted_as_the_engine_counts_them():
    plugins = {"metrics": {}, "ngram": {}}
    with LLM("tiny-chat", plugins=plugins) as llm:
        llm.generate("one two three one two three one two three", SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
        found = {metric.name.removeprefix("kernel:"): metric for metric in llm.get_metrics()}
        counts = llm.draft_counts
    assert counts.accepted > 0
    assert found["spec_decode_num_drafts"].value == counts.steps
    assert found["spec_decode_num_draft_tokens"].value == counts.drafted
    assert found["spec_decode_num_accepted_tokens"].value == counts.accepted
    places = found["spec_decode_num_accepted_tokens_per_pos"]
    assert isinstance(places, Vector) and [n for n in places.values if n] == counts.by_place


def test_without_the_plugin_the_error_says_what_to_do(byte_model):
    with LLM(str(byte_model)) as llm, pytest.raises(AttributeError, match="plugin that offers it may have to be enabled"):
        llm.get_metrics()


def test_buckets_hold_what_a_comparison_says():
    import numpy as np

    values = np.random.default_rng(0).choice([0.5, 1.0, 1.5, 2.0, 7.0, 10.0, 11.0], 200)
    alone, together = Histogram((1.0, 2.0, 10.0)), Histogram((1.0, 2.0, 10.0))
    for value in values:
        alone.observe(float(value))
    together.observe_each(values, np.ones(200, int))
    expected = [sum((values > low) & (values <= high)) for low, high in [(-1, 1), (1, 2), (2, 10), (10, 99)]]
    assert alone.counts == together.counts == expected and math.isclose(alone.sum, together.sum)


def families(url: str) -> dict[str, float]:
    answer = httpx.get(f"{url}/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain; version=")
    samples = [sample for family in text_string_to_metric_families(answer.text) for sample in family.samples]
    own = ("model_name", "engine")
    return {" ".join([s.name, *(v for k, v in sorted(s.labels.items()) if k not in own)]): s.value for s in samples}


def test_two_api_processes_add_up_and_dashboards_find_their_names(start_server, byte_model):
    settings = ["--set", "plugins.metrics.compatible_names=true", "--api-processes", "2"]
    server = start_server(*settings, model=byte_model)
    asked = 12
    for number in range(asked):  # a connection each, so that both processes get some
        body = {"prompt": "a" * (number + 1), "max_tokens": 3, "ignore_eos": True}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    httpx.get(f"{server.url}/nowhere/../secret-{number}")
    while (found := families(server.url)).get("kernel:http_requests_total POST /v1/completions 200", 0) < asked:
        time.sleep(0.1)  # told at most a second later
    assert found["kernel:http_requests_total POST /v1/completions 200"] == asked
    assert found["kernel:http_request_seconds_count /v1/completions"] == asked
    assert not any("secret" in name for name in found)
    assert found["kernel:generation_tokens_total"] == 3 * asked == found["vllm:generation_tokens_total"]
    assert found["kernel:e2e_request_latency_seconds_bucket +Inf"] == asked == found["vllm:e2e_request_latency_seconds_count"]
    missing = [name for name in EXPECTED if not any(f"vllm:{name}" == key.split()[0] for key in found)]
    assert not missing


def test_the_dashboard_asks_for_nothing_that_is_not_exported():
    dashboard = json.loads((ROOT / "plugins/metrics/grafana.json").read_text())
    asked = {name for panel in dashboard["panels"] for t in panel["targets"] for name in re.findall(r"kernel:(\w+)", t["expr"])}
    plain = {re.sub(r"(_bucket|_total|_sum|_count)$", "", name) for name in asked}
    assert len(asked) > 12 and plain <= set(SERIES)


class Collector(BaseHTTPRequestHandler):
    """What receives spans."""

    def do_POST(self):
        self.server.got.append(self.rfile.read(int(self.headers["content-length"])))
        self.send_response(200)
        self.end_headers()
        self.server.arrived.set()

    def log_message(self, *args):
        pass


@pytest.mark.slow
def test_a_span_of_a_request_goes_on_the_callers_trace(start_server, byte_model):
    collector_trace = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        collector.got, collector.arrived = [], threading.Event()
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{collector.server_port}/v1/traces"
        environment = {"OTEL_BSP_SCHEDULE_DELAY": "50"}
        server = start_server(
            "--set", f"plugins.metrics.otlp_traces_endpoint={endpoint}", model=byte_model, environment=environment
        )
        trace = "0af7651916cd43dd8448eb211c80319c"
        headers = {"traceparent": f"00-{trace}-b7ad6b7169203331-01", "x-request-id": "mine"}
        body = {"prompt": "abc", "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)
        assert answer.headers["x-request-id"] == "mine"
        assert collector.arrived.wait(20)
        collector.shutdown()
    sent = collector_trace.ExportTraceServiceRequest.FromString(collector.got[0])
    (span,) = sent.resource_spans[0].scope_spans[0].spans
    told = {a.key: a.value.int_value or a.value.string_value for a in span.attributes}
    assert span.name == "POST /v1/completions" and span.trace_id.hex() == trace
    assert told["gen_ai.usage.input_tokens"] == 3 and told["gen_ai.usage.output_tokens"] == 4
    assert told["gen_ai.request.id"] == "mine" and span.end_time_unix_nano > span.start_time_unix_nano


def test_what_a_step_pays():
    """The whole loop besides plan and commit, with the observer and without: printed."""
    from kernel_metrics.recorder import Recorder

    class Context:
        num_blocks, max_slots = (10_000,), 400

    plain, watched = (step_bench.run(256, 0.02, 200, observers=o) for o in ((), (Recorder(Context),)))
    print({name: (plain[name], watched[name]) for name in plain})
    assert plain.keys() == watched.keys()


def test_the_example_prints_totals(monkeypatch, capsys):
    example = ROOT / "examples/32_metrics.py"
    monkeypatch.setattr(sys, "argv", [str(example)])
    runpy.run_path(str(example), run_name="__main__")
    printed = capsys.readouterr().out
    assert "kernel:request_params_n: sum 4.000, count 4" in printed
    assert re.search(r"kernel:time_to_first_token_seconds: sum \d+\.\d+, count 4, up to \{.*'\+Inf': 4\}", printed)


def test_text_without_samples_is_empty():
    assert text([], {}, True) == b"" and isinstance(Counter("a", {}, 1).value, int)
