"""Lines of the batch format: requests in, answers out. https://platform.openai.com/docs/guides/batch"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError

#: what computes an answer; everything else that a server offers (administration, files, streams) is no part of a batch
URLS = re.compile(
    r"/v1/(completions|chat/completions|responses|embeddings|score)|/score|(/v[12])?/rerank|/v1/audio/(transcriptions|translations)"
)


class BatchRequest(BaseModel):
    """One line of the input."""

    model_config = ConfigDict(extra="forbid", strict=True)
    custom_id: str = Field(min_length=1)
    method: str = "POST"
    url: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """A line that is not blank. `id` names its place and content, so that an answer tells which line it belongs to. Either
    `request` or `error` (why the line is none) is there."""

    id: str
    line: int
    request: BatchRequest | None = None
    custom_id: str | None = None
    error: str | None = None


def read_rows(file: BinaryIO, max_bytes: int) -> Iterator[Row]:
    """Rows in order; blank lines are skipped. No line makes it raise."""
    seen: dict[str, int] = {}
    for number, (line, is_whole) in enumerate(_lines(file, max_bytes), 1):
        text = line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
        if text or not is_whole:
            row = _row(number, text, None if is_whole else f"it is longer than {max_bytes} bytes")
            earlier = seen.setdefault(row.custom_id, number) if row.request is not None and row.custom_id else number
            yield row if earlier == number else _refused(row, f"its custom_id {row.custom_id!r} is that of line {earlier}")


def _lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[bytes, bool]]:
    """(line, is it whole). What is too long is skipped, not kept in memory."""
    while line := file.readline(max_bytes + 1):
        whole = line.endswith(b"\n") or len(line) <= max_bytes
        rest = line
        while not whole and rest and not rest.endswith(b"\n"):
            rest = file.readline(max_bytes)
        yield line, whole


def _row(number: int, text: bytes, error: str | None) -> Row:
    name = "batch_req_" + hashlib.sha256(b"%d:" % number + text).hexdigest()[:24]
    if error is not None:
        return Row(name, number, error=f"line {number}: {error}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as problem:
        return Row(name, number, error=f"line {number} is not JSON: {problem}")
    given = found.get("custom_id") if isinstance(found, dict) else None
    custom_id = given if isinstance(given, str) else None
    try:
        return Row(name, number, BatchRequest.model_validate(found), custom_id)
    except ValidationError as problem:
        first = problem.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "line"
        return Row(name, number, None, custom_id, f"line {number}: {where}: {first['msg']}")


def _refused(row: Row, why: str) -> Row:
    return Row(row.id, row.line, None, row.custom_id, f"line {row.line}: {why}")


def refusal(request: BatchRequest) -> str | None:
    """Why a well-formed request is not sent, or None."""
    if request.method.upper() != "POST":
        return f"method {request.method!r} is not supported: batches take POST"
    if not URLS.fullmatch(request.url):
        return f"url {request.url!r} is not supported in a batch; for example /v1/chat/completions is"
    if request.body.get("stream"):
        return "stream is not supported in a batch: leave it out"
    return None


def answer(row: Row, status: int, request_id: str, body: Any) -> str:
    """The output line of a request that was answered, perhaps by an error of HTTP."""
    return _line(row, {"status_code": status, "request_id": request_id, "body": body}, None)


def bad_request(row: Row, message: str) -> str:
    """The output line of a well-formed request that is not sent."""
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": 400}
    return answer(row, 400, f"batch-{row.id}", {"error": error})


def failure(row: Row, code: str, message: str) -> str:
    """The output line of what was no request, or got no answer."""
    return _line(row, None, {"code": code, "message": message})


def _line(row: Row, response: Any, error: Any) -> str:
    line = {"id": row.id, "custom_id": row.custom_id, "response": response, "error": error}
    return json.dumps(line, ensure_ascii=False) + "\n"
