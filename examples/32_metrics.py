"""What an engine counts: the same numbers that a server shows on /metrics.

python examples/32_metrics.py [--model NAME]

A counter or a gauge is one value, a vector one value for each position, a histogram a sum and counts up to bounds.
"""

import argparse

from kernel_core import LLM, SamplingParams

PROMPTS = ["Hello, my name is", "The president of the United States is", "The capital of France is", "The future of AI is"]


def show(metric) -> str:
    if hasattr(metric, "buckets"):
        filled = {bound: count for bound, count in metric.buckets.items() if count or bound == "+Inf"}
        return f"{metric.name}: sum {metric.sum:.3f}, count {metric.count}, up to {filled}"
    return f"{metric.name}: {getattr(metric, 'values', None) or metric.value}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    given = parser.parse_args()
    with LLM(given.model, plugins={"metrics": {}}) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(temperature=0.8, top_p=0.95, seed=0))
        metrics = llm.get_metrics()
    for output in outputs:
        print(f"Prompt: {output.prompt!r}, generated: {output.outputs[0].text!r}")
    for metric in metrics:
        print(show(metric))


if __name__ == "__main__":
    main()
