"""From the name of a model to a directory: a directory itself, an embedded checkpoint, or a repository of the hub."""

from __future__ import annotations

import re
from pathlib import Path

from kernel_core.discovery import Installed, did_you_mean, load
from kernel_core.errors import ConfigError

KIND = "checkpoint"
WEIGHTS = "*.safetensors"
FILES = [WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "tokenizer*"]  # nothing that can run code when it is loaded
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_checkpoint(name: str) -> Path:
    """Where the files of a checkpoint are; a repository of the hub is downloaded unless it is on this machine already.
    Rate: build. Raises ConfigError saying what was tried."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    installed = Installed()
    found = installed.get(KIND, name)
    if found is not None:
        return Path(load(found)())
    if path.is_absolute() or name.startswith((".", "~")):
        raise ConfigError(f"model = {name!r}: there is no such directory")
    if _HUB_ID.fullmatch(name):
        return _from_hub(name)
    embedded = installed.names(KIND)
    raise ConfigError(
        f"model = {name!r} is no directory, no embedded checkpoint (installed: {', '.join(embedded) or 'none'}) and no hub id"
        f" of the form owner/name{did_you_mean(name, embedded)}"
    )


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(f"model = {name!r} looks like a hub id; to download it: pip install huggingface_hub") from error
    local = _complete_snapshot(name)
    if local is not None:
        return local
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:
        raise ConfigError(
            f"model = {name!r} is not on this machine and could not be downloaded ({type(error).__name__}: {error})."
            f" Without a network, give a directory that holds config.json and the weights"
        ) from error


def _complete_snapshot(name: str) -> Path | None:
    """The snapshot that an earlier download left here, when it has weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        path = Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return path if any(path.glob(WEIGHTS)) else None
