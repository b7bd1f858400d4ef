"""KV blocks that the device's pools have no room for go to host memory, then to disk, and come back when a prompt needs them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from kernel_core.api import EngineContext, Manifest, Section, hookimpl

if TYPE_CHECKING:
    from kernel_core.api import Connector
    from kernel_core.nn.api import BlockAccess, BlockStore, WorkerContext


class KVOffloadSection(Section):
    """`[plugins.kv_offload]`. Limits are per rank."""

    host_gib: float = Field(default=4.0, ge=0, description="host memory for KV blocks, in GiB; 0: none")
    disk_path: Path | None = Field(default=None, description="a folder for what host memory has no room for; none given: no disk")
    disk_gib: float = Field(default=32.0, gt=0, description="the most that this model's files may take there, in GiB")

    @model_validator(mode="after")
    def _keeps_something(self) -> KVOffloadSection:
        if not self.host_gib and self.disk_path is None:
            raise ValueError("host_gib = 0 and no disk_path: there is nowhere to keep blocks; set one of them")
        if "disk_gib" in self.model_fields_set and self.disk_path is None:
            raise ValueError("disk_gib limits what lies under disk_path: set disk_path as well, or leave it out")
        return self


manifest = Manifest(name="kv_offload", summary="evicted KV blocks wait in host memory and on disk", section=KVOffloadSection)


@hookimpl
def make_connector(context: EngineContext) -> Connector:
    from kernel_kv_offload.connector import OffloadConnector
    from kernel_kv_offload.identity import rank_folder

    return OffloadConnector(context.section, context.groups, rank_folder(context, 0))


@hookimpl
def make_block_store(context: WorkerContext, blocks: BlockAccess) -> BlockStore:
    from kernel_kv_offload.identity import rank_folder
    from kernel_kv_offload.store import OffloadStore

    return OffloadStore(context.section, blocks, rank_folder(context, context.rank))
