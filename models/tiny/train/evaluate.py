"""Measures both checkpoints as transformers runs them: bf16 weights, fp32 arithmetic, greedy."""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import dialogues
import facts
import questions
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = Path(__file__).resolve().parents[1] / "kernel_tiny"
FREE = Path(__file__).with_name("free_questions.txt")
SIZES = (10_000_000, 1_500_000)
Case = tuple[str, str]
CONSOLE = Console()


class Model:
    """A checkpoint that answers user messages."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def answer(self, asked: list[str], title: str, batch: int = 64) -> list[str]:
        chats = [[{"role": "user", "content": text}] for text in asked]
        order = sorted(range(len(asked)), key=lambda index: len(asked[index]))
        answers = [""] * len(asked)
        for start in track(range(0, len(order), batch), title, console=CONSOLE):
            part = order[start : start + batch]
            ids = self._encode([chats[index] for index in part])
            out = self.model.generate(**ids, max_new_tokens=72)
            texts = self.tokenizer.batch_decode(out[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
            for index, text in zip(part, texts):
                answers[index] = text
        return answers

    def _encode(self, chats: list) -> dict[str, torch.Tensor]:
        return self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        )

    @torch.inference_mode()
    def agreement(self, other: Model, cases: list[Case]) -> float:
        """The share of the answers' tokens where both models' first choice is the same."""
        same = total = 0
        for asked, answer in cases:
            head = self.tokenizer.apply_chat_template([{"role": "user", "content": asked}], add_generation_prompt=True)[
                "input_ids"
            ]
            ids = head + self.tokenizer(answer + self.tokenizer.eos_token, add_special_tokens=False)["input_ids"]
            mine, its = (m.model(torch.tensor([ids])).logits[0, len(head) - 1 : -1].argmax(-1) for m in (self, other))
            same, total = same + int((mine == its).sum()), total + len(mine)
        return same / total


def paraphrases(functions: list[facts.Function], rng: random.Random) -> list[Case]:
    return [(questions.compose(f.name, rng, heldout=True), f.doc) for f in functions]


def free(functions: list[facts.Function], rng: random.Random) -> list[Case]:
    shapes = FREE.read_text().splitlines()
    return [(rng.choice(shapes).replace("{n}", f.name), f.doc) for f in functions]


def signatures(functions: list[facts.Function], rng: random.Random) -> list[Case]:
    known = [f for f in functions if f.signature]
    return [(questions.compose(f.name, rng, heldout=True, cores=questions.SIGNATURES), f.signature) for f in known]


def short_calls(functions: list[facts.Function], rng: random.Random) -> list[Case]:
    """Functions that take one argument, with a whole number below a thousand or one word."""
    taught = [f for f in dialogues.callable_functions(functions) if f.required <= 1]
    return [_short_call(f, rng) for f in taught]


def _short_call(function: facts.Function, rng: random.Random) -> Case:
    said = str(rng.randrange(1000)) if rng.random() < 0.6 else f'"{rng.choice(dialogues.WORDS)}"'
    return f"Call {function.name} with {said}", dialogues.tool_call(function.name, [(function.parameters[0], said)])


def mixed_calls(functions: list[facts.Function], rng: random.Random) -> list[Case]:
    taught = dialogues.callable_functions(functions)
    return [dialogues.call_request(f.name, dialogues.given_parameters(f, rng), rng) for f in taught]


def unknown(functions: list[facts.Function], rng: random.Random) -> list[Case]:
    fakes = dialogues.Fakes(functions)
    return [(questions.compose(fakes.name(rng), rng, heldout=True), dialogues.UNKNOWN_FUNCTION) for _ in range(300)]


# measure → (cases, the share that is wanted)
MEASURES: dict[str, tuple[Callable[[list[facts.Function], random.Random], list[Case]], float]] = {
    "first line, held-out paraphrases": (paraphrases, 0.95),
    "first line, free wording": (free, 0.70),
    "tool call, one short argument": (short_calls, 0.90),
    "tool call, mixed arguments": (mixed_calls, 0.80),
    "signature": (signatures, 0.0),
    "I don't know (invented functions)": (unknown, 0.0),
}


def _same(answer: str, right: str) -> bool:
    """Tool calls are compared as JSON, all else as text."""
    if not right.startswith("<tool_call>"):
        return answer == right
    try:
        return json.loads(answer[11:-12]) == json.loads(right[11:-12])
    except ValueError:
        return False


def measure(model: Model, title: str, cases: list[Case], show: int = 0) -> float:
    answers = model.answer([asked for asked, _ in cases], title)
    wrong = [(asked, right, said) for (asked, right), said in zip(cases, answers) if not _same(said, right)]
    for asked, right, said in wrong[:show]:
        CONSOLE.print(f"  {asked!r}\n    right: {right!r}\n    said:  {said!r}", markup=False)
    return 1 - len(wrong) / len(cases)


def main(arguments: list[str] | None = None) -> None:
    """Prints a table and writes it as JSON when a file is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=10**6, help="ask at most this many questions of each kind")
    parser.add_argument("--wrong", type=int, default=0, help="show this many wrong answers of each kind")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    chat, draft = Model(PACKAGE / "tiny-chat"), Model(PACKAGE / "tiny-draft")
    figures = _figures(chat, options.sample, options.wrong) | _comparison(chat, draft, options.sample)
    table = Table("measure", "figure", "wanted", title=f"tiny-chat and tiny-draft, {time.monotonic() - start:.0f} s")
    for name, figure in figures.items():
        wanted = MEASURES[name][1] if name in MEASURES else 0
        table.add_row(name, f"{figure:.1%}" if figure <= 1 else f"{figure:,}", f"{wanted:.0%}" if wanted else "")
    CONSOLE.print(table)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n")


def _figures(chat: Model, sample: int, wrong: int) -> dict[str, float]:
    figures = {}
    for title, (cases_of, _) in MEASURES.items():
        rng = random.Random(title)
        cases = cases_of(facts.load(), rng)
        figures[title] = measure(chat, title, rng.sample(cases, min(sample, len(cases))), wrong)
    return figures


def _comparison(chat: Model, draft: Model, sample: int) -> dict[str, float]:
    """Sizes, how often the draft model's first choice is the chat model's, and how often bf16 says what fp32 says."""
    rng = random.Random("comparison")
    cases = rng.sample(paraphrases(facts.load(), rng) + mixed_calls(facts.load(), rng), min(sample, 300))
    sizes = [model.model.num_parameters() for model in (chat, draft)]
    assert all(size <= most for size, most in zip(sizes, SIZES)), sizes
    asked = [text for text, _ in cases[:32]]
    halves = Model(PACKAGE / "tiny-chat", torch.bfloat16)
    same = [a == b for a, b in zip(chat.answer(asked, "fp32"), halves.answer(asked, "bf16", batch=8))]
    return {
        "draft's first choice is the chat model's": chat.agreement(draft, cases),
        "bf16 arithmetic says the same as fp32": sum(same) / len(same),
        "parameters, tiny-chat": sizes[0],
        "parameters, tiny-draft": sizes[1],
    }


if __name__ == "__main__":
    main()
