"""`kernel run-batch`: every line has its answer in its place, whatever the lines are, and a run goes on where it stopped."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO

import pytest
from kernel_openai_batch.output import Output
from kernel_openai_batch.rows import read_rows

from kernel_core import LLM, SamplingParams
from kernel_core.api import RequestError
from kernel_core.cli import main


def completion(custom_id, prompt="Hello", url="/v1/completions", **body):
    given = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": given}


def chat(custom_id, text, **body):
    given = {"messages": [{"role": "user", "content": text}], "max_tokens": 5, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": given}


@pytest.fixture
def batch(tmp_path, byte_model, capsys):
    """Run lines (objects, or text as it is) → (exit code, answers, what was said)."""

    def run(lines, *options, out=tmp_path / "out.jsonl", source=None):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "in.jsonl").write_text("\n".join(texts) + "\n")
        given = ["-i", str(source or tmp_path / "in.jsonl"), "-o", str(out), "-m", str(byte_model), "--device", "cpu", *options]
        code = main(["run-batch", *given])
        said = capsys.readouterr().err
        found = [json.loads(line) for line in out.read_text().splitlines()] if hasattr(out, "exists") and out.exists() else []
        return code, found, said

    return run


def test_answers_are_the_engines_in_the_order_of_the_requests(batch, byte_model):
    """Long and short ones mixed, so that they end in another order than they began."""
    lengths = [60, 1, 30, 2, 45, 3]
    asked = [completion(f"r{i}", f"prompt {i}", max_tokens=n) for i, n in enumerate(lengths)]
    code, found, said = batch([*asked, "", chat("c", "Hi"), "   "])
    assert code == 0 and "7 requests, 0 with errors" in said
    assert [line["custom_id"] for line in found] == [*(f"r{i}" for i in range(6)), "c"]
    assert len({line["id"] for line in found}) == 7 and all(line["error"] is None for line in found)
    with LLM(str(byte_model)) as llm:
        for i, (line, length) in enumerate(zip(found, lengths, strict=False)):
            body = line["response"]["body"]
            (expected,) = llm.generate(f"prompt {i}", SamplingParams(temperature=0, max_tokens=length, ignore_eos=True))
            assert line["response"]["status_code"] == 200 and line["response"]["request_id"]
            assert body["choices"][0]["text"] == expected.outputs[0].text
    assert found[6]["response"]["body"]["object"] == "chat.completion"


def test_what_is_wrong_with_a_line_is_its_own_error(batch):
    bad = [
        "{not json",
        json.dumps([1, 2]),
        {"custom_id": "no-url", "body": {}},
        completion("again"),
        completion("again"),
        completion("method") | {"method": "GET"},
        completion("route", url="/metrics"),
        completion("embeddings", url="/v1/embeddings"),
        completion("stream", stream=True),
        completion("model", model="another"),
        completion("field", nonsense=1),
        completion("range", temperature=9),
        completion("long", prompt="x" * 5000),
        completion("extra") | {"surprise": 1},
        "[" * 100_000,
        completion("fine"),
    ]
    code, found, said = batch(bad)
    assert code == 1 and "16 requests, 14 with errors" in said and len(found) == len(bad)
    by = {line["custom_id"]: line for line in found}
    assert by["fine"]["response"]["status_code"] == 200 and found[3]["response"]["status_code"] == 200
    assert "line 1 is not JSON" in found[0]["error"]["message"] and found[0]["custom_id"] is None
    assert "custom_id 'again' is that of line 4" in found[4]["error"]["message"]

    def said_of(name):
        line = by[name]
        return json.dumps([line["error"], line["response"]]), line["response"]["status_code"] if line["response"] else None

    for name, words, status in [
        ("method", "batches take POST", 400),
        ("route", "not supported in a batch", 400),
        ("embeddings", "not served by this model", 400),
        ("stream", "stream is not supported", 400),
        ("model", "is not served here", 404),
        ("field", "nonsense", 400),
        ("range", "temperature", 400),
        ("long", "tokens", 400),
        ("extra", "surprise", None),
    ]:
        text, found_status = said_of(name)
        assert words in text and found_status == status, name


def test_a_run_goes_on_where_it_stopped_and_other_requests_are_refused(batch, tmp_path, capsys):
    asked = [completion(f"r{i}", f"prompt {i}") for i in range(5)]
    code, whole, _ = batch(asked)
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    lines = out.read_bytes().splitlines(keepends=True)
    out.unlink()
    marked = lines[1].replace(b'"custom_id"', b'"kept": 1, "custom_id"')
    partial.write_bytes(lines[0] + marked + lines[2][:25])  # the third was cut
    code, found, said = batch(asked)
    assert code == 0 and "5 requests, 2 from a run before" in said and not partial.exists()
    assert found[1].pop("kept") == 1
    answers = [line["response"]["body"]["choices"] for line in found]
    assert answers == [line["response"]["body"]["choices"] for line in whole]
    again = batch(asked)
    assert again[0] == 0 and "on cpu" not in again[2]  # all is there: no engine was started
    before = out.read_bytes()
    code, _, said = batch([completion("other"), *asked[1:]])
    assert code != 0 and "answers to other requests" in said
    code, found, _ = batch([completion("other")], "--restart")
    assert code == 0 and [line["custom_id"] for line in found] == ["other"] and before != out.read_bytes()


def test_a_file_that_is_no_output_is_not_overwritten(batch, tmp_path):
    (tmp_path / "out.jsonl").write_text("my diary\n")
    with pytest.raises(RequestError, match="no output of a batch"):
        Output(tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == "my diary\n"


def test_lines_that_are_too_long_are_skipped_without_reading_them_into_memory():
    rows = list(read_rows(BytesIO(b'{"a": "' + b"x" * 9000 + b'"}\n\n{}\n' + json.dumps(completion("z")).encode()), 300))
    assert [row.request is not None for row in rows] == [False, False, True]
    assert "longer than 300 bytes" in rows[0].error and [row.line for row in rows] == [1, 3, 4]
    rows = list(read_rows(BytesIO(b"\xef\xbb\xbf" + json.dumps(completion("first")).encode()), 300))
    assert rows[0].request is not None  # a byte order mark


class Storage(BaseHTTPRequestHandler):
    """GET gives the input; PUT fails once, then keeps the output."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.server.input)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["content-length"]))
        self.server.puts.append(content)
        self.send_response(503 if len(self.server.puts) == 1 else 200)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_input_and_output_may_be_addresses_and_an_upload_that_worked_is_not_repeated(batch, tmp_path):
    with HTTPServer(("127.0.0.1", 0), Storage) as storage:
        storage.input, storage.puts = json.dumps(completion("a")).encode(), []
        threading.Thread(target=storage.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{storage.server_port}"
        pause = ["--set", "plugins.openai_batch.upload_pause_seconds=0", "--output-tmp-dir", str(tmp_path)]
        code, _, said = batch([], *pause, out=f"{url}/out?signature=secret", source=f"{url}/in")
        storage.shutdown()
    assert code == 0 and len(storage.puts) == 2 and storage.puts[0] == storage.puts[1]
    assert json.loads(storage.puts[1])["custom_id"] == "a" and "secret" not in said
    assert not list(tmp_path.glob("batch-*"))
