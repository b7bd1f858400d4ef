"""The engine part: which content is stored, as far as it was told. It may be wrong: then a load fails, and only time is lost."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kernel_core.api import Ack, Job, KVGroup, encode
from kernel_kv_offload import KVOffloadSection, manifest
from kernel_kv_offload.disk import stored_names

GIB = 1 << 30
Name = tuple[int, bytes]  # KV group, key of the content
logger = logging.getLogger("kernel_core.kv_offload")


class OffloadConnector:
    """Implements `kernel_core.api.Connector`."""

    name = manifest.name

    def __init__(self, section: KVOffloadSection, groups: Sequence[KVGroup], folder: Path | None) -> None:
        self.groups = range(len(groups))
        room = (section.host_gib + (section.disk_gib if folder else 0)) * GIB
        self.most = int(room // min(group.bytes_per_block for group in groups)) if groups else 0
        self.stored: OrderedDict[Name, None] = OrderedDict()  # least recently used first
        self._evicted: dict[int, tuple[list[int], list[bytes]]] = {}
        self._jobs: dict[str, list[Name]] = {}  # on their way
        self._made, self._folder, self._ending = 0, folder, False
        self._remember(stored_names(folder) if folder else [])

    def evicted(self, group: int, ids: np.ndarray, keys: Sequence[bytes]) -> None:
        blocks, names = self._evicted.setdefault(group, ([], []))
        blocks += ids.tolist()
        names += keys

    def saves(self) -> Sequence[Job]:
        evicted, self._evicted = self._evicted, {}
        jobs = [self._job("save", [(group, ids, keys) for group, (ids, keys) in evicted.items()])] if evicted else []
        ending, self._ending = self._ending, False
        return [*jobs, self._job("flush", [])] if ending else jobs

    def closing(self) -> bool:
        """Files outlive the engine, host memory does not."""
        self._ending = self._folder is not None  # the next jobs are the last
        return self._ending

    def find(self, keys: Sequence[bytes]) -> int:
        for count, key in enumerate(keys):
            if not all((group, key) in self.stored for group in self.groups):
                return count
        return len(keys)

    def load(self, keys: Sequence[bytes], ids: Sequence[np.ndarray]) -> Job:
        return self._job("load", [(group, blocks.tolist(), list(keys)) for group, blocks in enumerate(ids)])

    def _job(self, action: str, parts: list[tuple[int, list[int], list[bytes]]]) -> Job:
        self._made += 1
        key = f"{action}:{self._made}"
        self._jobs[key] = [(group, name) for group, _, names in parts for name in names]
        return Job(self.name, key, encode((action, parts)))

    def done(self, ack: Ack) -> None:
        names = self._jobs.pop(ack.key)
        if ack.error is None:
            self._remember(names)
            return
        if not ack.key.startswith("load"):
            logger.warning("KV blocks could not be stored: %s", ack.error)
        for name in names:
            self.stored.pop(name, None)

    def _remember(self, names: Sequence[Name]) -> None:
        for name in names:
            self.stored[name] = None
            self.stored.move_to_end(name)
        while len(self.stored) > self.most:
            self.stored.popitem(last=False)
