"""What is measured, as data. Standard library only: other engines are measured with the same file."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """`requests` arrive at once. Ranges are inclusive; `shared` tokens begin every prompt."""

    summary: str
    requests: int
    prompt: tuple[int, int]
    new: tuple[int, int]
    shared: int = 0

    def make(self, vocab_size: int, seed: int = 0) -> list[tuple[list[int], int]]:
        """[(prompt token ids, new tokens)], the same for the same seed. Ids below 100 are left out: they may be special."""
        draw = random.Random(seed)
        low = min(100, vocab_size // 2)

        def ids(count: int) -> list[int]:
            return [draw.randrange(low, vocab_size) for _ in range(count)]

        shared = ids(self.shared)
        return [(shared + ids(draw.randint(*self.prompt)), draw.randint(*self.new)) for _ in range(self.requests)]

    def scaled(self, factor: float) -> Workload:
        """The same shape with shorter prompts and answers and fewer requests, for a quick look."""

        def less(value: int) -> int:
            return max(1, round(value * factor))

        prompt, new = ((less(a), less(b)) for a, b in (self.prompt, self.new))
        return Workload(self.summary, less(self.requests), prompt, new, round(self.shared * factor))


WORKLOADS = {
    "a": Workload("one stream: 128 tokens in, 128 out", 1, (128, 128), (128, 128)),
    "b": Workload("32 requests: 32 to 256 tokens in, 64 to 128 out", 32, (32, 256), (64, 128)),
    "c": Workload("32 requests that share 512 tokens: 16 own, 16 out", 32, (16, 16), (16, 16), shared=512),
}
