"""Where a model is: a directory, an embedded checkpoint by name, or a hub id."""

from __future__ import annotations

from pathlib import Path

from kernel_core.discovery import Installed, did_you_mean, load
from kernel_core.errors import ConfigError

HUB_PATTERNS = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt"]  # no pickles


def find_checkpoint(name: str) -> Path:
    """→ the checkpoint's directory. A hub id is taken from the local cache, else downloaded (only safetensors and text
    files). Raises ConfigError that says what was tried."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    embedded = Installed().all("checkpoint")
    for found in embedded:
        if found.name == name:
            return load(found)()
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return _from_hub(name)
    names = [found.name for found in embedded]
    raise ConfigError(
        f"model = {name!r} is neither a directory, nor a hub id (owner/name), nor an embedded checkpoint "
        f"({', '.join(names) or 'none is installed'}){did_you_mean(name, names)}"
    )


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(f"model = {name!r} is a hub id: pip install huggingface-hub, or give a local directory") from error
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS, local_files_only=True))
    except (OSError, ValueError):
        pass  # not in the local cache
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"model = {name!r} is not in the local hub cache and could not be downloaded: {reason}") from error
