"""Where the files of one model lie: KV is worth nothing to another one."""

from __future__ import annotations

import json
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from kernel_core.api import BuildContext

IRRELEVANT = ("kv_offload", "prefix_caching")  # plugins whose configuration changes no KV


def rank_folder(context: BuildContext, rank: int) -> Path | None:
    """Under `disk_path`, a folder for everything that KV depends on: the checkpoint and the configuration of whatever may change
    the model. Made here, readable by its owner only: KV tells of prompts. None: no disk."""
    if context.section.disk_path is None:
        return None
    plugins = {name: section for name, section in context.config.plugins.items() if name not in IRRELEVANT}
    engine = context.config.engine
    path = Path(context.model.path)
    files = sorted(file for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file())
    facts = {
        "kernel": version("kernel-core"),
        "config": dict(context.model.config),
        "files": [(file.name, (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files],
        "engine": [engine.dtype, engine.block_size],
        "device": context.config.device,
        "plugins": plugins,
    }
    name = sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:32]
    folder = context.section.disk_path.expanduser() / name / f"rank{rank}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.parent.chmod(0o700)
    return folder
