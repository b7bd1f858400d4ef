"""Inputs and outputs that are URLs: GET before the run, PUT after it."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from kernel_core.api import RequestError

if TYPE_CHECKING:
    from kernel_openai_batch import BatchSection


def is_url(name: str) -> bool:
    """http or https. Raises RequestError for other schemes."""
    scheme, found, _ = name.partition("://")
    if found and scheme.lower() not in ("http", "https"):
        raise RequestError(f"{name}: files and http(s) URLs are supported, {scheme} is not")
    return bool(found)


def local_name(url: str, folder: Path) -> Path:
    """Where an output that is a URL is kept until it is uploaded: the same in every run, and nothing of the URL, which may be
    signed, shows in it."""
    return folder / f"batch-{hashlib.sha256(url.encode()).hexdigest()[:16]}.jsonl"


def shown(url: str) -> str:
    """For messages: no query, no password."""
    parts = httpx.URL(url)
    return str(parts.copy_with(query=None, fragment=None, userinfo=b""))


def download(url: str, path: Path, section: BatchSection) -> None:
    """Raises RequestError when it fails, or is too long."""
    deadline, size = time.monotonic() + section.transfer_seconds, 0
    try:
        with (
            httpx.stream("GET", url, timeout=section.transfer_seconds, follow_redirects=True) as response,
            path.open("wb") as file,
        ):
            response.raise_for_status()
            for piece in response.iter_bytes():
                size += len(piece)
                if size > section.max_download_bytes or time.monotonic() > deadline:
                    raise RequestError(f"{shown(url)} is too long: see plugins.openai_batch.max_download_bytes, transfer_seconds")
                file.write(piece)
    except httpx.HTTPError as error:
        raise RequestError(f"cannot download {shown(url)}: {_why(error)}") from error


def upload(path: Path, url: str, section: BatchSection) -> None:
    """Tried again only when it failed. Raises RequestError, which says where the answers are."""
    problem = ""
    for number in range(section.upload_tries):
        if number:
            time.sleep(section.upload_pause_seconds)
        try:
            with path.open("rb") as file:
                size = {"Content-Length": str(path.stat().st_size), "Content-Type": "application/jsonl"}
                httpx.put(url, content=file, headers=size, timeout=section.transfer_seconds).raise_for_status()
            return
        except httpx.HTTPError as error:
            problem = _why(error)
    raise RequestError(f"cannot upload to {shown(url)}: {problem}; the answers are in {path}")


def _why(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    return f"{type(error).__name__}: {error}"
