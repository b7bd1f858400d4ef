"""The runner gives what one dense forward a token gives: batched, chunked, overlapped, greedy and sampled."""

import numpy as np
import pytest
import torch
from toy_worker import MAX_LEN, Driver, ToyModel, V, make_runner, oracle

from kernel_core.plan import PROMPT_LOGPROBS

PROMPTS = [[3, 1, 4, 1, 5], [9], list(range(20, 33)), [7, 7]]
SAMPLINGS = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("chunk", [3, 1000])
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(chunk, depth):
    model = ToyModel()
    driver = Driver(make_runner(model), chunk=chunk, depth=depth)
    toys = [driver.add(p, 10, key=77 + i, **s) for i, (p, s) in enumerate(zip(PROMPTS, SAMPLINGS))]
    assert driver.run() == [oracle(t.prompt, 10, t.sampling, t.key) for t in toys]
