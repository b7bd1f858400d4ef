"""Requests that are added while others run, whose decode steps a device may do whole, and how such steps are counted."""

from functools import partial

from kernel_core import SamplingParams

greedy = partial(SamplingParams, temperature=0, max_tokens=9, ignore_eos=True)
random = partial(SamplingParams, temperature=1.1, seed=7, max_tokens=9, ignore_eos=True)
REQUESTS = {
    "greedy": [([1, 2, 3], greedy()), (list(range(40)), greedy()), ([9], greedy(max_tokens=30))],
    "random": [([1, 2, 3], random()), ([5] * 20, greedy()), ([9], random(seed=1, max_tokens=20))],
    "filtered": [([1, 2, 3], random(top_k=5)), ([5] * 20, random(top_p=0.7)), ([9], random(min_p=0.1, max_tokens=12))],
    "ordinary between": [([1, 2, 3], greedy(max_tokens=20)), ([4], greedy(logprobs=2, max_tokens=5))],
}


def counting(steps, counted):
    """The part `steps` ("steady"), which enters the rows of every step that it did into `counted`."""

    def step(plan):
        done = steps(plan)
        counted.extend([] if done is None else [len(plan.rows)])
        return done

    return step


def run_all(engine, requests):
    """→ by request, its tokens and of how many of them there are logprobs."""
    outputs, waiting = {}, list(enumerate(requests))
    for turn in range(400):
        if waiting and turn % 3 == 0:
            name, (prompt, params) = waiting.pop(0)
            engine.add_request(str(name), prompt, params)
        for output in engine.step():
            outputs[output.request_id] = [(c.token_ids, len(c.logprobs or ())) for c in output.outputs]
        if not waiting and not engine.has_unfinished_requests():
            return outputs
    raise AssertionError("the requests did not end")
