"""Where a checkpoint is found, and which files one is made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kernel_safetensors.checkpoint import Safetensors

from kernel_core import checkpoints
from kernel_core.checkpoints import find_checkpoint
from kernel_core.errors import ConfigError


class Installation:
    """One embedded checkpoint, "tiny-chat", at the file system's root."""

    def get(self, kind, name):
        return name if name == "tiny-chat" else None

    def names(self, kind):
        return ["tiny-chat"]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(checkpoints, "Installed", Installation)
    monkeypatch.setattr(checkpoints, "load", lambda found: lambda: "/")


def test_a_directory_comes_before_an_embedded_name(tmp_path, monkeypatch):
    assert find_checkpoint(str(tmp_path)) == tmp_path
    assert find_checkpoint("tiny-chat") == Path("/")
    monkeypatch.chdir(tmp_path)
    Path("tiny-chat").mkdir()
    assert find_checkpoint("tiny-chat") == Path("tiny-chat")


@pytest.mark.parametrize(
    "name, message",
    [
        ("tiny-chta", "did you mean 'tiny-chat'"),
        ("./nowhere", "no such directory"),
        ("/nowhere/at/all", "no such directory"),
    ],
)
def test_an_unknown_name_says_what_was_tried(name: str, message: str):
    with pytest.raises(ConfigError, match=message):
        find_checkpoint(name)


def test_the_hub_is_asked_only_for_what_is_not_here(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        assert "*.safetensors" in allow_patterns and not any(p.endswith((".bin", ".py", ".pt")) for p in allow_patterns)
        if not local_files_only:
            raise OSError("no network")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    with pytest.raises(ConfigError, match=r"owner/name.*not on this machine.*no network.*Without a network, give a directory"):
        find_checkpoint("owner/name")
    (tmp_path / "model.safetensors").touch()
    assert find_checkpoint("owner/name") == tmp_path
    assert asked == [True, False, True]


def folder(path: Path, *files: str) -> str:
    for file in ("config.json", *files):
        (path / file).write_text("{}")
    return str(path)


def test_inspect_reads_the_configurations_only(tmp_path):
    path = folder(tmp_path, "model.safetensors", "generation_config.json")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.5}))
    info = Safetensors().inspect(path)
    assert (info.architecture, info.generation, info.format, info.path) == (
        "LlamaForCausalLM",
        {"temperature": 0.5},
        "safetensors",
        path,
    )


@pytest.mark.parametrize(
    "files, message",
    [
        (("pytorch_model.bin",), "pickle.*pytorch_model.bin.*save_pretrained"),
        ((), "no safetensors file.*random_weights"),
        (("a.safetensors", "b.safetensors"), "2 safetensors files and no model.safetensors.index.json"),
        (("model.safetensors.index.json",), "lists no files"),
    ],
)
def test_what_cannot_be_loaded_is_refused_with_advice(tmp_path, files: tuple[str, ...], message: str):
    path = folder(tmp_path, *files)
    assert Safetensors().recognises(path)
    with pytest.raises(ConfigError, match=message):
        Safetensors().inspect(path)
    assert Safetensors(weights_needed=False).inspect(path).config == {}


def test_broken_json_names_the_file(tmp_path):
    path = folder(tmp_path, "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is not valid JSON"):
        Safetensors().inspect(path)


def test_another_directory_is_not_recognised(tmp_path):
    assert not Safetensors().recognises(str(tmp_path))
