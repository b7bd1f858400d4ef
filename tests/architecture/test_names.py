"""The kernel names no feature, no model family and no vendor; module names say what is inside."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import source_tree as source

FEATURES = """eagle medusa ngram lora qlora peft gguf gptq awq marlin bitsandbytes torchao xgrammar llguidance outlines openai
anthropic prometheus grafana opentelemetry ray lmcache nixl mooncake fastapi uvicorn gradio streamlit rlhf verl trl"""
FAMILIES = """llama llama2 llama3 llama4 qwen qwen2 qwen3 mistral mixtral ministral gemma gemma2 gemma3 phi phi3 phi4 opt125m
deepseek gpt2 gptoss bert roberta t5 bart whisper llava pixtral mllama florence ultravox prithvi mamba jamba bamba falcon
olmo granite glm chatglm internlm baichuan yi starcoder bloom"""
VENDORS = """cuda nvidia nvlink nccl cudnn cublas flashinfer hopper blackwell h100 h200 rocm amd hip hpu gaudi habana intel xpu
tpu xla jax pallas neuron neuronx trainium inferentia ascend npu cann mps metal mlx apple triton mkldnn onednn spyre
tenstorrent"""
WORDS = frozenset(f"{FEATURES} {FAMILIES} {VENDORS}".split())

# What checkpoints themselves are written in, or a word with another meaning: (file, word) → why.
EXCEPTIONS = {
    ("nn/rope.py", "llama3"): "a rope_type of config.json files, used by several families",
}


def named(file: Path) -> list[tuple[str, int]]:
    """Forbidden words in the identifiers and strings of a file."""
    where = file.relative_to(source.KERNEL).as_posix()
    return sorted({(w, line) for w, line in source.vocabulary(file) if w in WORDS and (where, w) not in EXCEPTIONS})


@pytest.mark.parametrize("file", sorted(source.KERNEL.rglob("*.py")), ids=lambda f: f.relative_to(source.KERNEL).as_posix())
def test_kernel_names_no_feature_family_or_vendor(file: Path) -> None:
    assert named(file) == []


def test_kernel_data_is_the_default_profile_only() -> None:
    """The one file that may name plugins is a data file."""
    data = [f.name for f in source.KERNEL.rglob("*") if f.is_file() and f.suffix not in (".py", ".pyc")]
    assert set(data) <= {"py.typed", "default_profile.toml"}


@pytest.mark.parametrize("text", ["eagle_head", "useCUDA", "a LoRA adapter: lora", "TpuDevice"])
def test_word_list_sees_through_spelling(text: str) -> None:
    assert source.words(text) & WORDS


def test_no_module_is_a_drawer() -> None:
    """`utils` says nothing about what is inside; a mixin hides who calls whom."""
    drawers = ("utils", "util", "helpers", "helper", "misc", "common")
    files = [file for file in source.all_files() if file.stem in drawers or file.parent.name in drawers]
    classes = [n.name for f in source.all_files() for n in ast.walk(source.tree(f)) if isinstance(n, ast.ClassDef)]
    assert files == []
    assert [name for name in classes if name.lower().endswith("mixin")] == []


def test_every_distribution_follows_the_template() -> None:
    """Name kernel-<folder>, package kernel_<folder>, its own version, one line of description, a bounded kernel."""
    for distribution in source.distributions():
        folder, project = distribution.folder.name, distribution.project
        assert project["name"] == f"kernel-{folder.replace('_', '-')}", folder
        assert distribution.package == f"kernel_{folder}", folder
        assert project["version"] and "\n" not in project["description"].strip(), folder
        assert any(line.startswith("kernel-core") and "<1" in line for line in project["dependencies"]), folder
        assert distribution.entry_modules, f"{folder} declares no entry point of the kernel"
