"""The output file: written beside its place, kept line by line, put into place when it is whole."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from kernel_core.api import RequestError


class Output:
    """Answers go to PATH.partial in order, each line as soon as it is known; `finish` puts the file at PATH in one step. What a
    run before left in either is kept; a last line that was cut is dropped. `kept` are the ids of its lines."""

    def __init__(self, path: Path, restart: bool = False) -> None:
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.kept: list[str] = []
        self.kept_failed = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open(restart)
        except OSError as error:
            raise RequestError(f"cannot write {path}: {error}") from error

    def write(self, line: str) -> None:
        self._file.write(line.encode())
        self._file.flush()

    def finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.partial, self.path)

    def close(self) -> None:
        """Leave what is there for the next run."""
        self._file.close()

    def _open(self, restart: bool) -> BinaryIO:
        if restart:
            return open(self.partial, "wb")
        source = self.partial if self.partial.exists() else self.path
        whole = b"".join(self._read(source)) if source.exists() else b""
        draft = self.partial.with_name(self.partial.name + ".new")
        draft.write_bytes(whole)
        os.replace(draft, self.partial)
        return open(self.partial, "ab")

    def _read(self, source: Path) -> Iterator[bytes]:
        """Whole lines up to the first that is none."""
        for line in source.read_bytes().splitlines(keepends=True):
            found = _parse(line)
            if found is None:
                if line.endswith(b"\n"):
                    raise RequestError(f"{source} exists and is no output of a batch: choose another file, or --restart")
                return
            self.kept.append(found["id"])
            self.kept_failed += not succeeded(found)
            yield line


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("id"), str) else None


def succeeded(line: dict[str, Any]) -> bool:
    return line.get("error") is None and (line.get("response") or {}).get("status_code") == 200
