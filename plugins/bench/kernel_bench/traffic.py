"""Requests as clients send them, as data: lengths, texts and arrival times, the same for the same seed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TEXT = """time year people way day man thing woman life child world school state family student group country problem hand part
place case week company system program question work government number night point home water room mother area money
story fact month lot right study book eye job word business issue side kind head house service friend father power hour
game line end member law car city community name president team minute idea body information back parent face others
level office door health person art war history party result change morning reason research girl guy moment air teacher
force education"""
WORDS = _TEXT.split()


@dataclass(frozen=True, slots=True)
class Mix:
    """Log-normal lengths: mean words of a prompt and tokens of an answer, and the spread (sigma of the logarithm)."""

    summary: str
    prompt: float
    answer: float
    spread: float


MIXES = {
    "chat": Mix("a question and its answer, most short and some long", 160, 200, 0.9),
    "documents": Mix("long prompts, short answers", 1500, 120, 0.5),
    "writing": Mix("short prompts, long answers", 60, 600, 0.6),
}


@dataclass(frozen=True, slots=True)
class Planned:
    """`at`: seconds after the start; None in a closed loop, where a request follows the end of another."""

    prompt: str
    max_tokens: int
    at: float | None


@dataclass(frozen=True, slots=True)
class Shape:
    """How the requests of a run are made. `rate` requests a second come as a Poisson process when `burstiness` is 1; smaller is
    burstier. `prefix` words begin every prompt of a group."""

    requests: int
    mix: Mix
    rate: float | None = None
    burstiness: float = 1.0
    prefix: int = 0
    groups: int = 1
    longest: int = 100_000
    seed: int = 0

    def make(self, prompts: list[str] | None = None) -> list[Planned]:
        """`prompts`: texts to take in turn, instead of made-up ones."""
        draw = random.Random(self.seed)
        prefixes = [self._words(draw, self.prefix) for _ in range(self.groups)]
        times = self._times(draw)
        made = []
        for number in range(self.requests):
            own = prompts[number % len(prompts)] if prompts else self._words(draw, self._length(draw, self.mix.prompt))
            text = f"{draw.choice(prefixes)} {own}".strip()
            made.append(Planned(text, self._length(draw, self.mix.answer), next(times)))
        return made

    def _times(self, draw: random.Random) -> Iterator[float | None]:
        now = 0.0
        while True:
            yield None if self.rate is None else now
            if self.rate is not None and not math.isinf(self.rate):
                now += draw.gammavariate(self.burstiness, 1 / (self.rate * self.burstiness))

    def _length(self, draw: random.Random, mean: float) -> int:
        spread = self.mix.spread
        length = draw.lognormvariate(math.log(mean) - spread**2 / 2, spread)
        return max(1, min(self.longest, round(length)))

    @staticmethod
    def _words(draw: random.Random, count: int) -> str:
        return " ".join(draw.choices(WORDS, k=count))


def read_prompts(path: Path) -> list[str]:
    """One JSON object a line with "prompt", or "turns" of which the first is taken. Raises ValueError, OSError."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row["prompt"] if "prompt" in row else row["turns"][0] for row in found]
