"""Composes questions about a function: a core, a way to write the name, an opening, an ending, and noise words."""

from __future__ import annotations

import random
import tomllib
import zlib
from pathlib import Path

PHRASES: dict[str, list] = tomllib.loads(Path(__file__).with_name("phrases.toml").read_text())
CORES: list[str] = PHRASES["cores"]
SIGNATURES: list[str] = PHRASES["signatures"]
MARKS: list[str] = PHRASES["marks"]


def noisy(text: str, name: str, rng: random.Random) -> str:
    """Drops, doubles and inserts words; the function's name stays."""
    strength = rng.choice((0.0, 0.0, 0.05, 0.12, 0.3))
    words = []
    for word in text.split(" "):
        if rng.random() < strength:
            words.append(rng.choice(PHRASES["noise"]))
        if name in word or rng.random() > strength * 0.6:
            words.append(word)
    return " ".join(words)


def framed(core: str, rng: random.Random) -> str:
    opening = rng.choice(PHRASES["openings"]) if rng.random() < 0.35 else ""
    ending = rng.choice(PHRASES["endings"]) if rng.random() < 0.3 else ""
    return f"{opening}{core}{ending}"


def _cased(text: str, name: str, rng: random.Random) -> str:
    if rng.random() < 0.6 and not text.startswith((name, "help(")):
        text = text[:1].upper() + text[1:]
    return text


def is_heldout(core: str, written: str) -> bool:
    """True for one in ten combinations of core and way of writing: those are asked in the evaluation only."""
    return zlib.crc32(f"{core}|{written}|".encode()) % 10 == 0


def salad(name: str, rng: random.Random) -> str:
    """The name among unrelated words: whatever is around it, the question is about the name."""
    pool = PHRASES["noise"] + PHRASES["topics"] + PHRASES["words"] + PHRASES["verbs"] + PHRASES["nouns"]
    before, after = rng.choices(pool, k=rng.randint(0, 8)), rng.choices(pool, k=rng.randint(0, 7))
    written = rng.choice(PHRASES["names"]).replace("{n}", name)
    words = [word + ("," if rng.random() < 0.1 else "") for word in before] + [
        written + rng.choice(("", "", "", ":", ",", ".", "?"))
    ]
    return _cased(" ".join(words + after), name, rng) + rng.choice(MARKS)


def compose(name: str, rng: random.Random, heldout: bool = False, cores: list[str] = CORES, plain: float = 0.4) -> str:
    """A question about `name`. Held-out questions use combinations that the other ones never do.

    `plain` is the share of short questions: a fact is learned by being answered, and these cost few tokens.
    """
    if plain and not heldout and rng.random() < plain and cores is CORES:
        return rng.choice(PHRASES["plain"]).replace("{f}", name)
    while True:
        core, written = rng.choice(cores), rng.choice(PHRASES["names"])
        if is_heldout(core, written) == heldout:
            break
    text = framed(core.replace("{f}", written.replace("{n}", name)), rng)
    if not heldout or rng.random() < 0.5:
        text = noisy(text, name, rng)
    return _cased(text, name, rng) + rng.choice(MARKS)
