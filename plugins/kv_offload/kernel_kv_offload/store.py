"""The worker part: saves evicted blocks before they are overwritten, and loads stored ones while steps run."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from kernel_core.api import decode
from kernel_core.nn.api import BlockAccess, Download, LongJob
from kernel_kv_offload import KVOffloadSection
from kernel_kv_offload.disk import DiskTier
from kernel_kv_offload.host import CHUNK, HostTier

GIB = 1 << 30
Name = tuple[int, bytes]
Part = tuple[int, list[int], list[bytes]]  # KV group, blocks, keys
WAITING = 64  # blocks that wait to be written to disk, at most
AHEAD = 4  # chunks of a job that are on their way off the device, at most
logger = logging.getLogger("kernel_core.kv_offload")


class Missing(Exception):
    """A block is not stored any more."""


class Tiers:
    """Host memory over disk. What host memory has no room for is written to disk by a thread of its own."""

    def __init__(self, host: HostTier, disk: DiskTier | None) -> None:
        self.host, self.disk = host, disk
        self._lock, self._disk_lock = Lock(), Lock()  # of host memory and what is unwritten; of the disk
        self._writing: dict[Name, Future[None]] = {}
        self._unwritten: dict[Name, bytes] = {}
        self._failing = False  # said once, until a write succeeds
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv_offload_write") if disk else None

    def __contains__(self, name: Name) -> bool:
        with self._lock:
            return name in self.host or name in self._unwritten or (self.disk is not None and name in self.disk)

    def put(self, name: Name, data: Tensor) -> None:
        """A block that is not stored yet."""
        while True:
            with self._lock:
                if self.host.put(name, data):
                    return
                popped = self.host.pop()
                spilled = (name, data) if popped is None else popped
                content = spilled[1].numpy().tobytes() if self.disk else b""
            self._spill(spilled[0], content)
            if popped is None:
                return

    def get(self, name: Name) -> Tensor:
        """uint8 [bytes of a block]. Raises Missing."""
        with self._lock:
            row = self.host.get(name)
            if row is not None:
                return row.clone()
            content = self._unwritten.get(name)
        if content is None and self.disk is not None:
            with self._disk_lock:
                content = self.disk.get(name)
        if content is None or len(content) != self.host.sizes[name[0]]:
            raise Missing(f"block {name[1].hex()[:16]} of KV group {name[0]} is not stored any more")
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    def _spill(self, name: Name, content: bytes) -> None:
        if self.disk is None or self._writer is None:
            return
        self._writing = {key: future for key, future in self._writing.items() if not self._settled(future)}
        if len(self._writing) >= WAITING:
            wait_for(list(self._writing.values())[: WAITING // 2])
        with self._lock:
            self._unwritten[name] = content
        self._writing[name] = self._writer.submit(self._write, name, content)

    def _write(self, name: Name, content: bytes) -> None:
        assert self.disk is not None
        try:
            with self._disk_lock:
                self.disk.put(name, content)
            self._failing = False
        except OSError as error:
            if not self._failing:
                logger.warning("KV blocks are lost, for the disk takes none: %s", error)
            self._failing = True
        finally:
            with self._lock:
                self._unwritten.pop(name, None)

    @staticmethod
    def _settled(future: Future[None]) -> bool:
        """Raises what the write raised and did not expect."""
        if future.done():
            future.result()
        return future.done()

    def flush(self) -> None:
        """Host memory goes to disk, as far as that has room, most recently used last. No block may be put meanwhile."""
        if self._writer is None:
            return
        while popped := self.host.pop():
            self._spill(popped[0], popped[1].numpy().tobytes())
        for future in self._writing.values():
            future.result()

    def close(self) -> None:
        self.flush()
        if self._writer is not None:
            self._writer.shutdown()


class Flushing:
    """A LongJob: a thread brings host memory to disk."""

    def __init__(self, done: Future[None]) -> None:
        self._done = done

    def done(self, wait: float) -> bool:
        return bool(wait_for([self._done], wait).done)

    def finish(self) -> None:
        self._done.result()


class Saving:
    """A LongJob: blocks leave the device while steps run; the worker's thread puts them into the tiers as they arrive. It is
    `done` where the runner would wait anyway: then `finish` does. The store may have called `finish` before; what it raised it
    raises again."""

    def __init__(self, blocks: BlockAccess, tiers: Tiers) -> None:
        self._blocks, self._tiers = blocks, tiers
        self._moving: deque[tuple[list[Name], Download]] = deque()
        self._error: Exception | None = None

    def begin(self, group: int, ids: Sequence[int], keys: Sequence[bytes]) -> None:
        new = [(block, (group, key)) for block, key in zip(ids, keys) if (group, key) not in self._tiers]
        most = max(CHUNK // self._blocks.bytes_per_block[group], 1)
        for start in range(0, len(new), most):
            part = new[start : start + most]
            self._moving.append(([name for _, name in part], self._blocks.read(group, [block for block, _ in part])))
            while self._moving and (len(self._moving) > AHEAD or self._moving[0][1].arrived()):
                self._put(*self._moving.popleft())

    @property
    def moves(self) -> bool:
        """Is there something that `finish` has to do?"""
        return bool(self._moving)

    def done(self, wait: float) -> bool:
        return wait > 0 or all(rows.arrived() for _, rows in self._moving)

    @torch.inference_mode()
    def finish(self) -> None:
        if self._error is not None:
            raise self._error
        moving, self._moving = self._moving, deque()
        try:
            for names, rows in moving:
                self._put(names, rows)
        except Exception as error:
            self._error = error
            raise

    def _put(self, names: Sequence[Name], rows: Download) -> None:
        for name, row in zip(names, torch.from_numpy(rows.arrays()["blocks"])):
            if name not in self._tiers:
                self._tiers.put(name, row)


class Loading:
    """A LongJob: a thread reads the blocks, the worker's thread writes them to the device."""

    def __init__(self, rows: Future[list[Tensor]], parts: Sequence[Part], blocks: BlockAccess) -> None:
        self.rows, self.parts, self.blocks = rows, parts, blocks

    def done(self, wait: float) -> bool:
        return bool(wait_for([self.rows], wait).done)

    def finish(self) -> None:
        for (group, ids, _), rows in zip(self.parts, self.rows.result()):
            self.blocks.write(group, ids, rows)


class OffloadStore:
    """Implements `kernel_core.nn.api.BlockStore`."""

    def __init__(self, section: KVOffloadSection, blocks: BlockAccess, folder: Path | None) -> None:
        self.blocks = blocks
        disk = DiskTier(folder, int(section.disk_gib * GIB), blocks.layout) if folder else None
        self.pinned = blocks.device.type == "cuda"
        self.tiers = Tiers(HostTier(blocks.bytes_per_block, int(section.host_gib * GIB), self.pinned), disk)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="kv_offload_read")
        self._savings: list[Saving] = []

    def job(self, data: bytes) -> LongJob | None:
        action, parts = decode(data, tuple[str, list[Part]])
        if action == "load":
            return Loading(self._reader.submit(self._read, parts), parts, self.blocks)
        if action == "flush":
            for saving in self._savings:
                with suppress(Exception):  # the runner asks again, and is told
                    saving.finish()
            return Flushing(self._reader.submit(self.tiers.flush))
        saving = Saving(self.blocks, self.tiers)
        for part in parts:
            saving.begin(*part)
        if saving.done(0):
            saving.finish()
            return None
        self._savings = [*(other for other in self._savings if other.moves), saving]
        return saving

    def _read(self, parts: Sequence[Part]) -> list[Tensor]:
        return [self._rows(group, keys) for group, _, keys in parts]

    def _rows(self, group: int, keys: Sequence[bytes]) -> Tensor:
        rows = torch.empty(len(keys), self.blocks.bytes_per_block[group], dtype=torch.uint8, pin_memory=self.pinned)
        for row, key in zip(rows, keys):
            row.copy_(self.tiers.get((group, key)))
        return rows

    def close(self) -> None:
        """Nothing is lost that the disk has room for."""
        with ExitStack() as stack:  # each in its turn, whatever the others raise
            for close in (self.tiers.close, self._reader.shutdown, *(saving.finish for saving in self._savings)):
                stack.callback(close)
