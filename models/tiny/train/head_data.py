"""What the heads learn from: conversations, answered by the target itself, with its states. Kept in memory."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import evaluate
import facts
import fitting
import torch
import vocabulary
from dialogues import Message, Mixture
from head_models import AUX_LAYERS, Batch
from rich.progress import track
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

NEW_TOKENS = 72  # the longest answer
BATCH_TOKENS = 4096


@dataclass
class Text:
    """One conversation as the target says it: `ids`, `said`, and once read its states in fp16: `hidden` [T, H], `aux` [T, 3H]."""

    ids: list[int]
    said: list[bool]
    hidden: Tensor | None = None
    aux: Tensor | None = None


class Target:
    """The chat model in fp32."""

    def __init__(self, folder: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder)
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(self.device)
        self.embedding = self.model.lm_head.weight.detach()
        self.end = self.tokenizer.eos_token_id

    @torch.inference_mode()
    def answer(self, conversations: Iterable[list[Message]]) -> list[Text]:
        """The conversations as the target continues them greedily. The composed answers serve as drafts: where the target says
        the same nothing is generated; where it departs its own answer stands, and the conversation ends with it."""
        texts = [Text(*vocabulary.encode(self.tokenizer, messages)) for messages in conversations]
        departed = []
        for part in self._batches(texts, "checking answers"):
            logits = self.model(self._padded(part)).logits
            departed += [text for text, row in zip(part, logits.argmax(-1).tolist()) if self._cut(text, row)]
        unfinished = [text for text in departed if text.ids[-1] != self.end]
        for part in self._batches(unfinished, "generating the others"):
            self._continue(part)
        return [text for text in texts if text.ids[-1] == self.end]

    def _cut(self, text: Text, said: list[int]) -> bool:
        """End the text with the first token that the target says otherwise; whether there is one."""
        for place in range(1, len(text.ids)):
            if text.said[place] and said[place - 1] != text.ids[place]:
                text.ids[place:], text.said[place:] = [said[place - 1]], [True]
                return True
        return False

    def _continue(self, part: list[Text]) -> None:
        inputs = self.tokenizer.pad({"input_ids": [text.ids for text in part]}, padding_side="left", return_tensors="pt")
        out = self.model.generate(**inputs.to(self.device), max_new_tokens=NEW_TOKENS, do_sample=False)
        for text, new in zip(part, out[:, inputs["input_ids"].shape[1] :].tolist()):
            new = new[: new.index(self.end) + 1] if self.end in new else new
            text.ids, text.said = text.ids + new, text.said + [True] * len(new)

    @torch.inference_mode()
    def read(self, texts: list[Text]) -> None:
        """Fill in the states."""
        for part in self._batches(texts, "reading states"):
            out = self.model.model(self._padded(part), output_hidden_states=True)
            aux = torch.cat([out.hidden_states[layer] for layer in AUX_LAYERS], -1)
            for text, hidden, taps in zip(part, out.last_hidden_state, aux):
                text.hidden, text.aux = (x[: len(text.ids)].to(torch.float16, copy=True) for x in (hidden, taps))

    def _padded(self, part: list[Text]) -> Tensor:
        """[B, T]; padding at the right is never seen by what stands before it."""
        longest = max(len(text.ids) for text in part)
        pad = self.tokenizer.pad_token_id
        return torch.tensor([text.ids + [pad] * (longest - len(text.ids)) for text in part], device=self.device)

    def _batches(self, texts: list[Text], title: str) -> Iterator[list[Text]]:
        yield from track(list(batches(texts, BATCH_TOKENS)), title, transient=True)


def batches(texts: list[Text], tokens: int, rng: random.Random | None = None) -> Iterator[list[Text]]:
    """Texts of similar length together, at most `tokens` with padding; in random order when `rng` is given."""
    made: list[list[Text]] = [[]]
    for text in sorted(texts, key=lambda text: len(text.ids)):
        if made[-1] and (len(made[-1]) + 1) * len(text.ids) > tokens:
            made.append([])
        made[-1].append(text)
    made = [part for part in made if part]
    yield from rng.sample(made, len(made)) if rng else made


def collate(part: list[Text], device: torch.device) -> Batch:
    """Texts with states → tensors in fp32. A pair drafts when its token was generated and is not the last."""

    def padded(rows: list[Tensor]) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)

    pairs = [[t for t in range(len(text.ids) - 2) if text.said[t + 1]] for text in part]
    most = max(len(row) for row in pairs)
    pairs = [row + row[-1:] * (most - len(row)) if row else [0] * most for row in pairs]
    return Batch(
        ids=padded([torch.tensor(text.ids) for text in part]),
        said=padded([torch.tensor(text.said) for text in part]),
        hidden=padded([text.hidden.float() for text in part]),
        aux=padded([text.aux.float() for text in part]),
        pairs=torch.tensor(pairs, device=device),
    )


def training_texts(target: Target, conversations: int, seed: int) -> list[Text]:
    """Conversations of the chat model's own mixture, with states."""
    mixture = Mixture(facts.load(), seed, fitting.SKILLS)
    texts = target.answer([mixture.conversation() for _ in range(conversations)])
    target.read(texts)
    return texts


CASES: tuple[Callable[..., list[evaluate.Case]], ...] = (evaluate.paraphrases, evaluate.mixed_calls)


def heldout_texts(target: Target, number: int) -> list[Text]:
    """Questions that training never asks, half about functions in held-out words, half calls; answered by the target."""
    functions, rng = facts.load(), random.Random("held-out")
    cases = [case for kind in CASES for case in rng.sample(kind(functions, rng), number // len(CASES))]
    says = [[{"role": "user", "content": asked}, {"role": "assistant", "content": answer}] for asked, answer in cases]
    texts = target.answer(says)
    target.read(texts)
    return texts
