"""The same answers with and without prefix caching: four prompts that begin with the same hundred words.

python examples/06_prefix_caching.py [--model NAME]
"""

import argparse
import time

from kernel_core import LLM, SamplingParams

PREFIX = (
    "You keep the library of a small town by the sea. The shelves hold novels, maps of the coast, books about fishing and boats, "
    "and the letters of two poets who lived here a hundred years ago. Children come on Mondays, students in the evening, and "
    "visitors all summer long. You know every book, and where it stands. When somebody asks a question, you answer in one "
    "friendly sentence, you say which shelf to go to, and you never invent a title. If you do not know the answer, you say so "
    "and offer to look it up until tomorrow. A visitor has just come in from the rain, and puts down his hat. He says: "
)
PROMPTS = ["Hello, my name is", "The president of the United States is", "The capital of France is", "The future of AI is"]


def answer(model: str, caching: bool) -> list:
    """The outputs of an engine with or without the plugin; a first call fills its cache."""
    with LLM(model, plugins={"prefix_caching": {} if caching else False}) as llm:
        params = SamplingParams(temperature=0.0)
        llm.generate(PREFIX + PROMPTS[0], params)
        started = time.perf_counter()
        outputs = llm.generate([PREFIX + prompt for prompt in PROMPTS], params)
        seconds = time.perf_counter() - started
    print(f"Prefix caching {'on' if caching else 'off'}: {seconds:.3f} s")
    for output in outputs:
        tokens = f"{output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens cached"
        print(f"  Prompt: ...{output.prompt.removeprefix(PREFIX)!r}, generated: {output.outputs[0].text!r} ({tokens})")
    return outputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    model = parser.parse_args().model
    without, cached = answer(model, False), answer(model, True)
    same = [output.outputs[0].text for output in without] == [output.outputs[0].text for output in cached]
    print("Generated answers are the same:", same)
    assert same and all(output.num_cached_tokens for output in cached)


if __name__ == "__main__":
    main()
