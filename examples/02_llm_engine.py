"""Driving the engine by hand: a request is added before each step, so that requests with different parameters overlap.

python examples/02_llm_engine.py [--model NAME]
"""

import argparse

from kernel_core import Engine, RequestOutput, SamplingParams

REQUESTS = [
    (
        "A robot may not injure a human being",
        SamplingParams(temperature=0.0, logprobs=1, prompt_logprobs=1),
    ),
    (
        "To be or not to be,",
        SamplingParams.of(temperature=0.8, top_k=5, presence_penalty=0.2, seed=1),
    ),
    (
        "What is the meaning of life?",
        SamplingParams.of(n=2, temperature=0.8, top_p=0.95, frequency_penalty=0.1, seed=2),
    ),
]


def run(engine: Engine) -> dict[str, RequestOutput]:
    waiting, finished = list(enumerate(REQUESTS)), {}
    while waiting or engine.has_unfinished_requests():
        if waiting:
            number, (prompt, params) = waiting.pop(0)
            engine.add_request(str(number), prompt, params)
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = output
    return finished


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    with Engine(model=parser.parse_args().model) as engine:
        finished = run(engine)
    for number, output in sorted(finished.items()):
        print(f"request {number}: {output.prompt!r}, {len(output.prompt_token_ids)} prompt tokens")
        for completion in output.outputs:
            print(f"  [{completion.index}] {completion.text!r} ({completion.finish_reason}, {len(completion.token_ids)} tokens)")
    first = finished["0"]
    completion = first.outputs[0]
    token = completion.token_ids[0]
    print(f"first token of request 0: {completion.logprobs[0][token]}; in all {completion.cumulative_logprob:.2f}")
    print(f"prompt logprobs of request 0: {first.prompt_logprobs[0]}, {next(iter(first.prompt_logprobs[1].values()))}, ...")
    assert len(finished) == 3 and len(finished["2"].outputs) == 2
    assert first.prompt_logprobs[0] is None and len(first.prompt_logprobs) == len(first.prompt_token_ids)


if __name__ == "__main__":
    main()
