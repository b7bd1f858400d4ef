"""A directory with config.json and safetensors files, one or several with an index. torch is imported when weights are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kernel_core.api import ConfigError, ModelInfo
from kernel_safetensors.pages import MappedFile

if TYPE_CHECKING:
    from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGE = 1 << 20  # bytes from which letting go of a tensor's pages pays
PICKLED = ("*.bin", "*.pt", "*.pth")


class Safetensors:
    """Implements `CheckpointFormat`. `weights_needed` False: a directory without weights will do."""

    format = "safetensors"

    def __init__(self, weights_needed: bool = True) -> None:
        self.weights_needed = weights_needed

    def recognises(self, path: str) -> bool:
        return (Path(path) / "config.json").is_file()

    def inspect(self, path: str) -> ModelInfo:
        """Raises ConfigError when the files are not what an engine can load."""
        folder = Path(path)
        if self.weights_needed:
            weight_files(folder)
        generation = folder / "generation_config.json"
        return ModelInfo(
            path=path,
            format=self.format,
            config=_read(folder / "config.json"),
            generation=_read(generation) if generation.is_file() else {},
        )

    def tensors(self, path: str) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in file order. The tensors are read-only views of the memory-mapped files: nothing is read before it is
        used, and what of a large one was read is let go when the next is asked for (it comes back when used again)."""
        from safetensors import safe_open

        for file in weight_files(Path(path)):
            with safe_open(file, framework="pt") as opened:
                mapped: MappedFile | None = None
                for name in opened.offset_keys():
                    tensor = opened.get_tensor(name)
                    yield name, tensor
                    if tensor.nbytes >= LARGE:
                        mapped = mapped or MappedFile(file)
                        mapped.drop(tensor.data_ptr(), tensor.nbytes)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, by the index where there is one. Raises ConfigError when there are none."""
    if (folder / INDEX).is_file():
        listed = _read(folder / INDEX).get("weight_map") or {}
        files = [folder / name for name in sorted(set(listed.values()))]
        lacking = [file.name for file in files if not file.is_file()]
        if lacking or not files:
            raise ConfigError(f"{folder / INDEX} lists {', '.join(lacking) or 'no files'}: the checkpoint is not complete")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return files
    if files:
        raise ConfigError(f"{folder} has {len(files)} safetensors files and no {INDEX} that says which belong to the model")
    raise ConfigError(_no_weights(folder))


def _no_weights(folder: Path) -> str:
    pickled = sorted(file.name for pattern in PICKLED for file in folder.glob(pattern))
    if not pickled:
        return f"{folder} holds no safetensors file; a model without weights runs with engine.random_weights = true"
    return (
        f"{folder} holds its weights as pickle ({pickled[0]}), which can run code when it is loaded; convert it where you trust"
        " it: python -c \"from transformers import AutoModelForCausalLM as M; M.from_pretrained('DIR').save_pretrained('NEW')\""
    )


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
