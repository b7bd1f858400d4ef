"""Makes both checkpoints from nothing: data, tokenizer, models, measurement. `python models/tiny/train/run.py --help`."""

from __future__ import annotations

import os

# Two or more threads that wait by spinning stand in each other's way when a neighbour is busy: set before torch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path

import facts
import fitting
import torch
import vocabulary
from rich.console import Console
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

PACKAGE = Path(__file__).resolve().parents[1] / "kernel_tiny"
SEED = 20


def _edit(file: Path, drop: tuple[str, ...] = (), **changes: object) -> None:
    content = json.loads(file.read_text()) | changes
    kept = {key: value for key, value in content.items() if key not in drop}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A checkpoint folder in bf16 that older readers of the configuration files understand as well."""
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    _edit(folder / "config.json", rope_theta=500.0)
    _edit(folder / "generation_config.json", do_sample=False)
    save_tokenizer(tokenizer, folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    known = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": False, "add_eos_token": False}
    _edit(folder / "tokenizer_config.json", ("backend", "extra_special_tokens", "is_local", "local_files_only"), **known)


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    functions = facts.load()
    tokenizer = vocabulary.train(functions, seed)
    for name in fitting.SHAPES:
        save_tokenizer(tokenizer, PACKAGE / name)
    return tokenizer


def make_model(name: str, options: argparse.Namespace) -> None:
    """All rounds, or with --resume the last one from the weights that are there."""
    folder = PACKAGE / name
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rounds = list(enumerate(fitting.ROUNDS[name]))
    if options.resume:
        model, rounds = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), rounds[-1:]
    else:
        model = fitting.untrained(name, tokenizer, options.seed)
    for index, recipe in rounds:
        seed = options.seed + index
        model = fitting.fit(model, recipe, tokenizer, seed, lambda average: save(average, tokenizer, folder), options.minutes)
        save(model, tokenizer, folder)


def main() -> None:
    """Runs the stages that are asked for, in order."""
    stages = ["facts", "tokenizer", *fitting.SHAPES, "evaluate"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"some of: {', '.join(stages)} (all but facts)")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="the most that each round may take")
    parser.add_argument("--resume", action="store_true", help="only the last round, from the weights that are there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console()
    for stage in options.stages or stages[1:]:
        console.rule(stage)
        run(stage, options)


def run(stage: str, options: argparse.Namespace) -> None:
    if stage == "facts":
        # In a process without torch, which puts functions of its own into `inspect`.
        subprocess.run([sys.executable, facts.__file__], check=True)
    elif stage == "tokenizer":
        make_tokenizer(options.seed)
    elif stage == "evaluate":
        import evaluate

        evaluate.main([])
    else:
        make_model(stage, options)


if __name__ == "__main__":
    main()
