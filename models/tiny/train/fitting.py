"""Trains one model: copy drills first, then the mixture of conversations, with loss on what the assistant says."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
import vocabulary
from dialogues import ALL_SKILLS, Mixture, Proportions
from facts import Function, load
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Keep = Callable[[LlamaForCausalLM], None]
Row = tuple[list[int], list[bool]]
BATCH_TOKENS = 1024
BATCHES = 2  # of one step, computed side by side: each core works on its own, and none waits for a busy one
KEEP_EVERY = 50
THETA = 500.0
POOL = 2000  # conversations sorted by length at a time, so that batches have little padding


@dataclass(frozen=True)
class Shape:
    """The size of a model."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int


@dataclass(frozen=True)
class Round:
    """One pass of training: about so many drills, mixed into the first `drilled` conversations; the rate falls to zero."""

    conversations: int
    drills: int
    drilled: int
    proportions: Proportions = field(default_factory=Proportions)
    rate: float = 2e-3
    matrix_rate: float = 0.015
    warmup: int = 12
    decay: float = 0.6  # the share of the steps in which the rate falls to nothing


SKILLS = Proportions(ALL_SKILLS, plain=0.15, salad=0.3)
SHAPES = {
    "tiny-chat": Shape(hidden=256, layers=4, heads=4, kv_heads=2, ffn=1024),
    "tiny-draft": Shape(hidden=128, layers=2, heads=4, kv_heads=2, ffn=448),
}
FACTS_ROUND = Round(conversations=38000, drills=14000, drilled=38000)
SKILLS_ROUND = Round(conversations=60000, drills=12000, drilled=40000, proportions=SKILLS)
ROUNDS = {"tiny-chat": [FACTS_ROUND, SKILLS_ROUND], "tiny-draft": [FACTS_ROUND]}


def build(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model."""
    config = LlamaConfig(
        vocab_size=vocabulary.SIZE,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=vocabulary.CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model


@torch.no_grad()
def prime_copying(model: LlamaForCausalLM, seed: int) -> None:
    """Lets the first two layers start as a circuit that continues what came before (an induction head), because training alone
    finds it late: two heads of layer 0 fetch the token before and the one before that, two heads of layer 1 look for the place
    where both are the same as here, and say what stood there. Everything else starts quiet, so that it does not drown them.
    """
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.mul_(0.02)
        layer.self_attn.o_proj.weight.mul_(0.1)
    hidden = model.config.hidden_size
    basis = torch.linalg.qr(torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(seed)))[0]
    basis[0] = 0  # the first number of every embedding is the same, and is what positions are sought with
    size = model.config.head_dim
    if hidden < 4 * size:
        raise ValueError(f"the circuit needs four subspaces of a head's size {size}, the hidden size is {hidden}")
    read, last, before, said = (basis[:, start : start + size] for start in range(0, 4 * size, size))
    norm = _mark_positions(model)
    _fetch_tokens_before(model, read, (last, before), norm)
    _find_and_repeat(model, read, last, before, said, norm)


def _mark_positions(model: LlamaForCausalLM) -> tuple[float, float]:
    """Gives all embeddings the same first number → (that number after a norm, root mean square of an embedding)."""
    hidden, std = model.config.hidden_size, model.config.initializer_range
    constant = 0.5 * std * hidden**0.5
    model.model.embed_tokens.weight[:, 0] = constant
    size = (std**2 + constant**2 / hidden) ** 0.5
    return constant / size, size


def _fetch_tokens_before(model: LlamaForCausalLM, read: Tensor, subspaces: tuple[Tensor, ...], norm: tuple[float, float]) -> None:
    """Layer 0, first KV head: query head n points n + 1 tokens back, by the fast rotations alone, and writes what it reads."""
    attention, size = model.model.layers[0].self_attn, model.config.head_dim
    half, fast = size // 2, size // 8
    angle = THETA ** (-torch.arange(fast) / half)
    strength = (3.6 * size**0.5) ** 0.5 / norm[0]
    attention.k_proj.weight[:size] = 0
    attention.k_proj.weight[:fast, 0] = strength
    attention.v_proj.weight[:size] = 0.25 * read.T
    for head, subspace in enumerate(subspaces):
        query = attention.q_proj.weight[head * size : (head + 1) * size].zero_()
        query[:fast, 0] = strength * torch.cos((head + 1) * angle)
        query[half : half + fast, 0] = -strength * torch.sin((head + 1) * angle)
        attention.o_proj.weight[:, head * size : (head + 1) * size] = 0.25 * subspace


def _find_and_repeat(
    model: LlamaForCausalLM, read: Tensor, last: Tensor, before: Tensor, said: Tensor, norm: tuple[float, float]
) -> None:
    """Layer 1, first KV head, in the slow rotations: a key is (token before, the one before that), a query (this token, the
    one before)."""
    attention, size = model.model.layers[1].self_attn, model.config.head_dim
    half, slow = size // 2, size // 2 - size * 7 // 32
    pairs = [number for low in range(slow, half) for number in (low, low + half)]
    one, two = pairs[0::2], pairs[1::2]
    count = len(one)
    strength = (25.0 * size**0.5 / count) ** 0.5
    written = strength * norm[1] / 0.25**2
    attention.k_proj.weight[:size] = 0
    attention.k_proj.weight[one] = written * last[:, :count].T
    attention.k_proj.weight[two] = 0.7 * written * before[:, count : 2 * count].T
    attention.v_proj.weight[:size] = said.T
    for head in range(model.config.num_attention_heads // model.config.num_key_value_heads):
        query = attention.q_proj.weight[head * size : (head + 1) * size].zero_()
        query[one] = strength * read[:, :count].T
        query[two] = 0.7 * written * last[:, count : 2 * count].T
        attention.o_proj.weight[:, head * size : (head + 1) * size] = 12.0 * norm[1] * said


def _drill(rng: random.Random) -> Row:
    """Random tokens that come twice, with others before and between; the second time they count.

    Few different ones, as in a number, come again before their turn: then the last token alone does not say what follows.
    """

    alphabet = range(len(vocabulary.SPECIAL), vocabulary.SIZE)
    if rng.random() < 0.6:
        alphabet = rng.sample(alphabet, rng.choice((6, 12, 24)))

    def tokens(low: int, high: int) -> list[int]:
        return rng.choices(alphabet, k=rng.randint(low, high))

    before, copied, between = tokens(0, 6), tokens(4, 14), tokens(1, 6)
    ids = before + copied + between + copied
    return ids, [False] * (len(ids) - len(copied) + 1) + [True] * (len(copied) - 1)


def _rows(functions: list[Function], tokenizer: PreTrainedTokenizerFast, recipe: Round, seed: int) -> Iterator[Row]:
    rng = random.Random(seed)
    mixture = Mixture(functions, seed, recipe.proportions)
    for index in range(recipe.conversations):
        if index < recipe.drilled and rng.random() < recipe.drills / recipe.drilled:
            yield _drill(rng)
        yield vocabulary.encode(tokenizer, mixture.conversation())


def _pools(rows: Iterator[Row], size: int) -> Iterator[list[Row]]:
    while pool := [row for _, row in zip(range(size), rows)]:
        yield pool


def batches(rows: Iterator[Row], seed: int) -> Iterator[list[Row]]:
    """Rows of similar length together, at most BATCH_TOKENS tokens with padding."""
    rng = random.Random(seed)
    for pool in _pools(rows, POOL):
        made: list[list[Row]] = [[]]
        for row in sorted(pool, key=lambda row: len(row[0])):
            if (len(made[-1]) + 1) * len(row[0]) > BATCH_TOKENS:
                made.append([])
            made[-1].append(row)
        yield from rng.sample(made, len(made))


def _tensors(batch: list[Row], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch])
    said = torch.tensor([said + [False] * (longest - len(said)) for _, said in batch])
    return ids.to(device), said.to(device)


def _loss(model: LlamaForCausalLM, ids: Tensor, said: Tensor) -> Tensor:
    """Cross entropy where the assistant speaks. Padding stands at the right: a causal model never sees it."""
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    wanted = said[:, 1:]
    return nn.functional.cross_entropy(model.lm_head(hidden[wanted]), ids[:, 1:][wanted], reduction="sum")


def _one_core() -> None:
    torch.set_num_threads(1)


def _gradients(model: LlamaForCausalLM, step: list[list[Row]], pad: int, pool: ThreadPoolExecutor) -> float:
    """Sets the gradients of the mean loss over some batches, each computed in a thread of its own."""
    parameters = list(model.parameters())

    def one(batch: list[Row]) -> tuple[float, int, tuple[Tensor, ...]]:
        ids, said = _tensors(batch, pad, model.device)
        loss = _loss(model, ids, said)
        return loss.item(), int(said[:, 1:].sum()), torch.autograd.grad(loss, parameters)

    done = list(pool.map(one, step))
    counted = sum(tokens for _, tokens, _ in done)
    for parameter, *parts in zip(parameters, *[grads for _, _, grads in done]):
        parameter.grad = sum(parts[1:], parts[0]) / counted
    return sum(loss for loss, _, _ in done) / counted


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal by Newton-Schulz steps in fp32 (torch's own does them in bf16, which many CPUs lack)."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            with ThreadPoolExecutor(BATCHES, initializer=_one_core) as pool:
                list(pool.map(partial(self._move, rate=group["lr"], inertia=group["momentum"]), group["params"]))

    @torch.no_grad()
    def _move(self, weight: nn.Parameter, rate: float, inertia: float) -> None:
        momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
        momentum.lerp_(weight.grad, 1 - inertia)
        update = orthogonal(weight.grad.lerp(momentum, inertia))
        weight.sub_(update, alpha=rate * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5)


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix with all singular values moved near one: quintic Newton-Schulz, iterated on the small Gram matrix."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    unit = torch.eye(len(gram), device=gram.device)
    total = unit
    for _ in range(steps):
        factor = torch.addmm(3.4445 * unit - 4.7750 * gram, gram, gram, alpha=2.0315)
        total = factor @ total
        gram = factor @ (factor @ gram)
    wide = total @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def _optimizers(model: LlamaForCausalLM, recipe: Round) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    inner = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for name, p in model.named_parameters() if p.ndim == 1 or "embed" in name]
    return [Muon(inner, recipe.matrix_rate), torch.optim.AdamW(rest, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=0.0)]


def _scale(step: int, done: float, recipe: Round) -> float:
    return min(1.0, (step + 1) / recipe.warmup, (1 - done) / recipe.decay)


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    return Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"))


def _update(optimizers: list[torch.optim.Optimizer], rates: list[float], scale: float) -> None:
    for optimizer, rate in zip(optimizers, rates):
        optimizer.param_groups[0]["lr"] = rate * scale
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def untrained(name: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = build(SHAPES[name], tokenizer)
    prime_copying(model, seed)
    return model


def fit(
    model: LlamaForCausalLM, recipe: Round, tokenizer: PreTrainedTokenizerFast, seed: int, keep: Keep, minutes: float
) -> LlamaForCausalLM:
    """Trains for one round, `minutes` at most: the learning rate falls with the time as with the steps.

    `keep` gets the running average of the weights now and then, for those who cannot wait.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    shadow = copy.deepcopy(model).requires_grad_(False)
    optimizers = _optimizers(model, recipe)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    made = list(batches(_rows(load(), tokenizer, recipe, seed), seed))
    plan = [made[start : start + BATCHES] for start in range(0, len(made), BATCHES)]
    with _bar() as bar, ThreadPoolExecutor(BATCHES, initializer=_one_core) as pool:
        task = bar.add_task("steps", total=len(plan), loss=0.0)
        start = time.monotonic()
        for step, group in enumerate(plan):
            done = max(step / len(plan), (time.monotonic() - start) / 60 / minutes)
            if done >= 1:
                break
            loss = _gradients(model, group, tokenizer.pad_token_id, pool)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            _update(optimizers, rates, _scale(step, done, recipe))
            torch._foreach_lerp_(list(shadow.parameters()), list(model.parameters()), 0.03)
            bar.update(task, advance=1, loss=loss)
            if step % KEEP_EVERY == KEEP_EVERY - 1:
                keep(shadow)
                bar.console.print(f"step {step + 1} of {len(plan)}: loss {loss:.3f}")
    return model.eval()
