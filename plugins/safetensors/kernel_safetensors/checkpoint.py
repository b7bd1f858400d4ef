"""config.json, generation_config.json and *.safetensors, whole or sharded with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_core.api import ConfigError, ModelInfo

if TYPE_CHECKING:
    from torch import Tensor

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth")


class SafetensorsCheckpoint:
    """Implements `CheckpointFormat`. Never reads a pickle."""

    format = "safetensors"

    def recognises(self, path: str) -> bool:
        return (Path(path) / "config.json").is_file()

    def inspect(self, path: str) -> ModelInfo:
        """Raises ConfigError for files that are missing or no JSON."""
        folder = Path(path)
        tokenizer = folder if (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file() else None
        return ModelInfo(
            path=str(folder),
            format=self.format,
            config=_json(folder / "config.json"),
            generation=_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {},
            tokenizer_path=str(tokenizer) if tokenizer else None,
        )

    def tensors(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in file order; the tensors are views of memory-mapped files."""
        from safetensors import safe_open

        for file in files(Path(path)):
            with safe_open(str(file), "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    yield name, opened.get_tensor(name)


def files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint. Raises ConfigError when there are none, or only pickles."""
    if (folder / INDEX).is_file():
        found = [folder / name for name in sorted(set(_json(folder / INDEX)["weight_map"].values()))]
    elif (folder / SINGLE).is_file():
        found = [folder / SINGLE]
    else:
        found = sorted(folder.glob("*.safetensors"))
    missing = [file.name for file in found if not file.is_file()]
    if missing:
        raise ConfigError(f"{folder}: the index names {', '.join(missing)}, which is not there; download the checkpoint again")
    if not found and any(list(folder.glob(pattern)) for pattern in PICKLES):
        raise ConfigError(
            f"{folder} has its weights as pickles, which are never loaded because they can run code; convert them: "
            "transformers' model.save_pretrained(folder) writes safetensors"
        )
    if not found:
        raise ConfigError(f"{folder} has no *.safetensors file")
    return found


def _json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
