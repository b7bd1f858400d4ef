"""The tokenizer of both models: byte-level BPE, digits one by one, and the chat template."""

from __future__ import annotations

from pathlib import Path

from dialogues import Message, Mixture, Proportions
from facts import Function
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SIZE = 4096
CONTEXT = 1024
PAD, END = "<|pad|>", "<|end|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant", "tool")}
SPECIAL = [PAD, END, *ROLES.values()]
MARKUP = ["<tool_call>", "</tool_call>", "<tools>", "</tools>"]
TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def _corpus(functions: list[Function], seed: int) -> list[str]:
    """Answers twice as often as questions, so that what is generated gets the short encodings."""
    mixture = Mixture(functions, seed, Proportions(plain=0.0))
    asked = [message["content"] for _ in range(12000) for message in mixture.conversation()]
    return asked + [text for f in functions for text in (f.doc, f" {f.name}", f.signature, f.name) * 4]


def train(functions: list[Function], seed: int) -> PreTrainedTokenizerFast:
    """A tokenizer that spells any text; its markup tokens stay visible when special tokens are skipped."""
    tokenizer = Tokenizer(models.BPE())
    digits, bytes_ = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(MARKUP), special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(functions, seed), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in MARKUP])
    return _wrapped(tokenizer)


def _wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES.values()),
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.chat_template = TEMPLATE.read_text().rstrip("\n")
    return wrapped


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation as the template writes it, and which of them the assistant says."""
    ids: list[int] = []
    said: list[bool] = []
    for message in messages:
        content = tokenizer.backend_tokenizer.encode(message["content"] + END, add_special_tokens=False).ids
        ids += [tokenizer.convert_tokens_to_ids(ROLES[message["role"]]), *content]
        said += [False, *[message["role"] == "assistant"] * len(content)]
    return ids, said
