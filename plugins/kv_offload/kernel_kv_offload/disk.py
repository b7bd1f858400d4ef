"""The second tier: a file for each block. `GROUP-KEY.kv` holds a mark, a hash of the KV layout, a checksum, and the bytes.

Files survive a restart, and several processes may share a folder: writing ends with a rename, and whatever is damaged, of
another layout, or gone meanwhile is a miss.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import OrderedDict
from hashlib import blake2b
from pathlib import Path

Name = tuple[int, bytes]
MARK = b"KERNELKV1\n"
HASH = 32  # bytes
STALE = 3600.0  # seconds after which a file that was never finished is removed
logger = logging.getLogger("kernel_core.kv_offload")


def file_name(name: Name) -> str:
    return f"{name[0]}-{name[1].hex()}.kv"


def stored_names(folder: Path) -> list[Name]:
    """What a folder holds, least recently used first."""
    found = []
    for file in os.scandir(folder):
        group, _, key = file.name.removesuffix(".kv").partition("-")
        if file.name.endswith(".kv") and group.isdecimal():
            try:
                found.append((file.stat().st_mtime_ns, (int(group), bytes.fromhex(key))))
            except (FileNotFoundError, ValueError):
                continue  # it went away, or is no file of ours
    return [name for _, name in sorted(found)]


class DiskTier:
    """`limit`: bytes of all files together. `layout`: what the bytes of a block mean; other files are not read."""

    def __init__(self, folder: Path, limit: int, layout: str) -> None:
        self.folder, self.limit = folder, limit
        self.layout = blake2b(layout.encode(), digest_size=HASH).digest()
        self._sizes: OrderedDict[Name, int] = OrderedDict()  # least recently used first
        self._clean()
        for name in stored_names(folder):
            size = self._size(name)
            if size:
                self._sizes[name] = size
        self.used = sum(self._sizes.values())
        self._shrink()

    def __contains__(self, name: Name) -> bool:
        return name in self._sizes

    def put(self, name: Name, data: bytes) -> None:
        """Write a block, unless it is there. Raises OSError."""
        content = MARK + self.layout + self._checksum(name, data) + data
        if len(content) > self.limit:
            return
        path = self.folder / file_name(name)
        if name in self._sizes and path.exists():
            self._touch(name)
            return
        unfinished = path.with_suffix(f".{secrets.token_hex(8)}.tmp")  # no other process has this name
        try:
            unfinished.write_bytes(content)
            unfinished.replace(path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        self.used += len(content) - self._sizes.pop(name, 0)
        self._sizes[name] = len(content)
        self._touch(name)
        self._shrink()

    def get(self, name: Name) -> bytes | None:
        """A block's bytes, or None: a miss."""
        try:
            content = (self.folder / file_name(name)).read_bytes()
        except FileNotFoundError:
            self._forget(name)
            return None
        head, data = content[: len(MARK) + 2 * HASH], content[len(MARK) + 2 * HASH :]
        if head == MARK + self.layout + self._checksum(name, data):
            self._touch(name)
            return data
        logger.warning("%s is damaged or of another KV layout: removed", self.folder / file_name(name))
        self._remove(name)
        return None

    def _checksum(self, name: Name, data: bytes) -> bytes:
        return blake2b(data, digest_size=HASH, key=blake2b(file_name(name).encode(), digest_size=HASH).digest()).digest()

    def _size(self, name: Name) -> int:
        try:
            return (self.folder / file_name(name)).stat().st_size
        except FileNotFoundError:
            return 0

    def _touch(self, name: Name) -> None:
        if name not in self._sizes:  # another process wrote it
            self._sizes[name] = self._size(name)
            self.used += self._sizes[name]
        self._sizes.move_to_end(name)
        try:
            now = time.time_ns()  # finer than what the file system takes by itself
            os.utime(self.folder / file_name(name), ns=(now, now))
        except FileNotFoundError:
            self._forget(name)

    def _forget(self, name: Name) -> None:
        self.used -= self._sizes.pop(name, 0)

    def _remove(self, name: Name) -> None:
        (self.folder / file_name(name)).unlink(missing_ok=True)
        self._forget(name)

    def _shrink(self) -> None:
        while self.used > self.limit:
            self._remove(next(iter(self._sizes)))

    def _clean(self) -> None:
        for file in self.folder.glob("*.tmp"):
            try:
                if time.time() - file.stat().st_mtime > STALE:
                    file.unlink()
            except FileNotFoundError:
                continue  # its owner finished it
