"""The fixed batch that `kernel profile` runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from kernel_core.api import Engine, RequestError

_runs = count()


@dataclass(frozen=True, slots=True)
class Batch:
    """`lengths[i]`: tokens that request i generates; the first comes out of the prefill."""

    prompt_len: int
    lengths: tuple[int, ...]
    seed: int = 0

    @property
    def num_steps(self) -> int:
        return max(self.lengths)


def of_steps(size: int, prompt_len: int, steps: int, seed: int = 0) -> Batch:
    """All requests take part in every step."""
    return _checked(Batch(prompt_len, (steps,) * size, seed))


def to_completion(size: int, prompt_len: int, fewer: int, seed: int = 0) -> Batch:
    """The first decode step has all requests, each further one `fewer` less, and the very last step one request alone: 128
    requests and 32 give 128 (prefill), 128, 96, 64, 32, 1."""
    if fewer < 1:
        raise RequestError("--to-completion needs at least 1")
    lengths = [2 + index // fewer for index in range(size)]
    if lengths:
        lengths[-1] += 1
    return _checked(Batch(prompt_len, tuple(lengths), seed))


def _checked(batch: Batch) -> Batch:
    if not batch.lengths or batch.prompt_len < 1 or batch.num_steps < 1:
        raise RequestError("--batch-size, --prompt-len and --steps must be at least 1")
    return batch


def check_fits(engine: Engine, batch: Batch) -> None:
    """One step must take all prompts, or prefill would not be one step. Raises RequestError."""
    sizes = engine.core.allocation
    size, tokens = len(batch.lengths), len(batch.lengths) * batch.prompt_len
    longest = batch.prompt_len + batch.num_steps
    checks: Sequence[tuple[bool, str]] = (
        (
            tokens <= sizes.max_tokens_per_step,
            f"{tokens} prompt tokens do not fit into one step: engine.max_tokens_per_step is {sizes.max_tokens_per_step}",
        ),
        (size <= sizes.max_slots, f"{size} requests do not run at once: engine.max_requests is {sizes.max_slots}"),
        (
            longest <= sizes.max_model_len,
            f"prompt and output have {longest} tokens: engine.max_model_len is {sizes.max_model_len}",
        ),
    )
    for fits, problem in checks:
        if not fits:
            raise RequestError(f"{problem}; make the batch smaller or raise that")


def run_batch(engine: Engine, batch: Batch) -> None:
    """Run it to its end. Prompts differ from run to run, so that no cache spares the prefill. Raises RequestError."""
    number = next(_runs)
    draw = np.random.default_rng((batch.seed, number))
    for index, length in enumerate(batch.lengths):
        prompt = draw.integers(0, engine.core.report.vocab_size, batch.prompt_len).tolist()
        params = engine.intake.params(temperature=0.0, max_tokens=length, ignore_eos=True, detokenize=False)
        engine.add_request(f"profile-{number}-{index}", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.error:
                raise RequestError(f"a request of the batch failed: {output.error}")
