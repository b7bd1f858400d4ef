"""Trains the drafter heads of tiny-chat on its own states and greedy answers. `python models/tiny/train/heads.py --help`."""

from __future__ import annotations

import os

# Threads that wait by spinning stand in each other's way when a neighbour is busy: set before torch starts.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fitting import Muon
from head_data import Target, Text, batches, collate, heldout_texts, training_texts
from head_measure import accepted_length, load_head
from head_models import AUX_LAYERS, STEPS, Batch, Draft, Eagle, Eagle3, Head, MLPSpeculator, head_of
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = Path(__file__).resolve().parents[1] / "kernel_tiny"
SEED = 20
DRAFT_VOCABULARY = 2048
SHOW_EVERY = 50
CONSOLE = Console()


@dataclass(frozen=True)
class Recipe:
    """How one head is trained: passes over the texts, tokens a step, rates, and the weight of the states' regression."""

    epochs: float
    tokens: int = 512
    rate: float = 2e-3
    matrix_rate: float = 0.02
    regression: float = 0.0
    warmup: int = 10


@dataclass(frozen=True)
class Kind:
    """One head: what its config.json says beyond the sizes it takes from the target, and what is wanted of it."""

    config: Callable[[Any], dict[str, Any]]
    recipe: Recipe
    wanted: float


def _llama(target: Any, architecture: str, **changes: Any) -> dict[str, Any]:
    same = ("hidden_size", "head_dim", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "vocab_size")
    same += ("hidden_act", "max_position_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id")
    config = {name: getattr(target, name) for name in same}
    rope = target.rope_parameters["rope_theta"]
    config |= {"architectures": [architecture], "model_type": "llama", "num_hidden_layers": 1, "rope_theta": rope}
    return config | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"} | changes


def _eagle(target: Any) -> dict[str, Any]:
    return _llama(target, "LlamaForCausalLM", intermediate_size=1024)


def _eagle3(target: Any) -> dict[str, Any]:
    extra = {"draft_vocab_size": DRAFT_VOCABULARY, "eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS)}
    return _llama(target, "LlamaForCausalLMEagle3", intermediate_size=1024, **extra)


def _mlp(target: Any) -> dict[str, Any]:
    shape = {"emb_dim": target.hidden_size, "inner_dim": 128, "vocab_size": target.vocab_size, "n_predict": STEPS}
    options = {"top_k_tokens_per_head": [5, 4, 3], "n_candidates": 5, "tie_weights": True, "scale_input": True}
    kind = {"architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator", "torch_dtype": "bfloat16"}
    return shape | options | kind


KINDS = {
    "tiny-chat-eagle": Kind(_eagle, Recipe(epochs=1.75, regression=1.0), 2.3),
    "tiny-chat-eagle3": Kind(_eagle3, Recipe(epochs=2), 2.6),
    "tiny-chat-mlp": Kind(_mlp, Recipe(epochs=2.5, tokens=768, rate=5e-3), 2.0),
}


# ---- before the first step -------------------------------------------------------------------------------------------


def frequent_tokens(texts: list[Text], number: int, vocabulary: int) -> Tensor:
    """The ids that the target says most often, ascending; unused ones fill up."""
    said = Counter(token for text in texts for token, mine in zip(text.ids, text.said) if mine)
    order = [token for token, _ in said.most_common()] + [token for token in range(vocabulary) if token not in said]
    return torch.tensor(sorted(order[:number]))


def untrained(config: dict[str, Any], target: Target, texts: list[Text]) -> Head:
    """A head with random matrices whose inputs and outputs have about unit size, and the target's embeddings where it has any."""
    kept = frequent_tokens(texts, config["draft_vocab_size"], config["vocab_size"]) if "draft_vocab_size" in config else None
    head = head_of(config, target.embedding) if kept is None else Eagle3(config, target.embedding, kept)
    for name, parameter in head.named_parameters():
        if parameter.ndim == 2:
            last = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(parameter, 0, (0.3 if last else 1) * parameter.shape[1] ** -0.5)
    sample = texts[: len(texts) // 50 + 1]
    if isinstance(head, MLPSpeculator):
        _start_speculator(head, target)
    elif isinstance(head, Eagle3):
        _start_eagle3(head, target, torch.cat([text.aux for text in sample]).float().std(), kept)
    else:
        _start_eagle(head, target, torch.cat([text.hidden for text in sample]).float().std())
    return head.to(target.device)


@torch.no_grad()
def _start_eagle(head: Eagle, target: Target, size: Tensor) -> None:
    hidden = head.config["hidden_size"]
    head.fc.weight[:, :hidden].div_(target.embedding.std().cpu())
    head.fc.weight[:, hidden:].div_(size).mul_(0.7)


@torch.no_grad()
def _start_eagle3(head: Eagle3, target: Target, size: Tensor, kept: Tensor) -> None:
    head.fc.weight.div_(size)
    head.lm_head.weight.copy_(target.embedding[kept])


@torch.no_grad()
def _start_speculator(head: MLPSpeculator, target: Target) -> None:
    """Embeddings and heads start in the target's own principal directions, unit size as the format's scales expect."""
    inner = head.speculator.head[0].weight.shape[1]
    directions = torch.linalg.svd(target.embedding, full_matrices=False).Vh[:inner]
    low = target.embedding @ directions.T
    for embedding in head.speculator.emb:
        embedding.weight.copy_(low / low.std())
    for linear in head.speculator.head:
        linear.weight.copy_(low / low.std() * 0.1)


# ---- training --------------------------------------------------------------------------------------------------------


def loss_of(head: Head, batch: Batch, embedding: Tensor, regression: float) -> tuple[Tensor, Tensor]:
    """(loss, tokens it counts): cross entropy with the target's distribution over every step of the unroll, and for heads
    that predict states smooth L1 to the target's."""
    total, counted = torch.zeros((), device=batch.ids.device), torch.zeros((), device=batch.ids.device)
    ids = head.target_ids()
    for step, draft in enumerate(head.unroll(batch)):
        counts = batch.counts(step)
        states = batch.state(step + 1)
        with torch.no_grad():
            logits = F.linear(states[counts], embedding)
            inside = torch.ones(len(logits), device=logits.device)
            if ids is not None:
                inside = (logits.argmax(-1)[:, None] == ids).any(-1).float()
                logits = logits[:, ids]
            wanted = logits.softmax(-1)
        total = total + _step_loss(draft, counts, states, wanted, inside, regression)
        counted = counted + counts.sum()
    return total, counted


def _step_loss(draft: Draft, counts: Tensor, states: Tensor, wanted: Tensor, inside: Tensor, regression: float) -> Tensor:
    loss = (F.cross_entropy(draft.logits[counts], wanted, reduction="none") * inside).sum()
    if regression:
        loss = loss + regression * F.smooth_l1_loss(draft.state[counts], states[counts], reduction="none").mean(-1).sum()
    return loss


def _optimizers(head: Head, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for norms, embeddings and heads."""
    outer = ("emb", "lm_head", "head", "norm", "ln")
    named = [(name, p) for name, p in head.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if p.ndim == 2 and not set(outer) & set(name.split("."))]
    rest = [p for _, p in named if not any(p is q for q in inner)]
    return [Muon(inner, recipe.matrix_rate), torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)]


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=CONSOLE)


def train(head: Head, name: str, recipe: Recipe, target: Target, texts: list[Text], options: argparse.Namespace) -> Head:
    """All steps of one head; the rates fall to zero, with the time as with the steps where `--minutes` bounds it."""
    rng = random.Random(options.seed)
    epochs = recipe.epochs * options.epochs
    made = [part for _ in range(int(epochs + 1)) for part in batches(texts, recipe.tokens, rng)]
    made = made[: max(1, round(len(made) * epochs / int(epochs + 1)))]
    optimizers = _optimizers(head, recipe)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    start, losses = time.monotonic(), []
    with _bar() as bar:
        task = bar.add_task(name, total=len(made), loss=0.0)
        for step, part in enumerate(made):
            done = max(step / len(made), (time.monotonic() - start) / 60 / options.minutes)
            if done >= 1:
                break
            total, counted = loss_of(head, collate(part, target.device), target.embedding, recipe.regression)
            (total / counted.clamp(min=1)).backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            for optimizer, rate in zip(optimizers, rates):
                optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / recipe.warmup, (1 - done) / 0.8)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append((total / counted).item())
            bar.update(task, advance=1, loss=losses[-1])
            if step % SHOW_EVERY == SHOW_EVERY - 1:
                bar.console.print(f"{name}, step {step + 1} of {len(made)}: loss {sum(losses) / len(losses):.3f}")
                losses.clear()
    return head.eval()


def save(head: Head, folder: Path) -> None:
    """config.json and model.safetensors under the published names, floats in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in head.state_dict().items()}
    tensors = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(head.config, indent=2, sort_keys=True) + "\n")


# ---- the command -----------------------------------------------------------------------------------------------------


def measure(target: Target, folders: dict[str, Path], number: int) -> dict[str, float]:
    """Mean accepted length of each head, greedy, 3 drafts, held-out questions, from its files."""
    texts = heldout_texts(target, number)
    return {name: accepted_length(load_head(folder, target), texts, target.device) for name, folder in folders.items()}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Trains the heads that are asked for, saves them and measures them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("heads", nargs="*", metavar="HEAD", help=f"some of: {', '.join(KINDS)} (all)")
    parser.add_argument("--target", type=Path, default=PACKAGE / "tiny-chat", help="the chat model's folder")
    parser.add_argument("--out", type=Path, default=PACKAGE, help="where the heads' folders go")
    parser.add_argument("--conversations", type=int, default=8000)
    parser.add_argument("--epochs", type=float, default=1.0, help="factor on the passes of every recipe")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="the most that each head may take")
    parser.add_argument("--heldout", type=int, default=300, help="questions of the measurement")
    parser.add_argument("--only-measure", action="store_true", help="measure the heads that are there")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    target, names = Target(options.target), options.heads or list(KINDS)
    if not options.only_measure:
        _train_all(target, names, options)
    figures = measure(target, {name: options.out / name for name in names}, options.heldout)
    for name, figure in figures.items():
        CONSOLE.print(f"{name}: {figure:.2f} tokens a step with {STEPS} drafts (wanted {KINDS[name].wanted})")
    return figures


def _train_all(target: Target, names: list[str], options: argparse.Namespace) -> None:
    texts = training_texts(target, options.conversations, options.seed)
    for name in names:
        kind = KINDS[name]
        torch.manual_seed(options.seed)
        head = untrained(kind.config(target.model.config), target, texts)
        save(train(head, name, kind.recipe, target, texts, options), options.out / name)


if __name__ == "__main__":
    main()
