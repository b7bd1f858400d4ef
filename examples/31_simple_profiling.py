"""A trace of everything between start_profile and stop_profile, for Perfetto or chrome://tracing.

python examples/31_simple_profiling.py [--model NAME] [--directory FOLDER]

The directory comes from the configuration only. Without it, start_profile is refused.
"""

import argparse

from kernel_core import LLM, SamplingParams

PROMPTS = ["Hello, my name is", "The president of the United States is", "The capital of France is", "The future of AI is"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--directory", default="build/profiles")
    given = parser.parse_args()
    with LLM(given.model, plugins={"profiling": {"directory": given.directory}}) as llm:
        llm.start_profile()
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.8, top_p=0.95, seed=0))
        files = llm.stop_profile()
    for output in outputs:
        print(f"Prompt: {output.prompt!r}, generated: {output.outputs[0].text!r}")
    for path in files:
        print("Wrote", path)


if __name__ == "__main__":
    main()
