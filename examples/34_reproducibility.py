"""The same tokens in every run, although they are drawn at random: draws are a function of (seed, position).

The engine's seed gives each request draws of its own; a request's own seed fixes it alone, whatever runs beside it. Nothing
of Python's or PyTorch's random state is read or changed, so what a program draws itself does not depend on the engine either.

python examples/34_reproducibility.py [--model NAME]
"""

import argparse
import random

from kernel_core import LLM, SamplingParams

SEED = 42
PROMPTS = ["Hello, my name is", "The president of the United States is", "The capital of France is", "The future of AI is"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    random.seed(SEED)
    with LLM(parser.parse_args().model, seed=SEED) as llm:
        params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32)
        for output in llm.generate(PROMPTS, params):
            print(f"Prompt: {output.prompt!r}, generated: {output.outputs[0].text!r}")

        own = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32, seed=7)
        (alone,) = llm.generate(PROMPTS[0], own)
        *_, in_company = llm.generate([*PROMPTS[1:], PROMPTS[0]], [params] * 3 + [own])
        print(f"With a seed of its own: {alone.outputs[0].text!r}")
        print("The same alone and in company:", alone.outputs[0].token_ids == in_company.outputs[0].token_ids)
        assert alone.outputs[0].token_ids == in_company.outputs[0].token_ids
    print("random.randint:", random.randint(0, 1000))


if __name__ == "__main__":
    main()
