"""Two questions over one long table: the second one only computes what is new.
The embedded model was not taught to read tables: a larger one answers 29 and 30.

python examples/07_automatic_prefix_caching.py [--model NAME]
"""

import argparse
import time

from kernel_core import LLM, SamplingParams

NAMES = """John Doe, Jane Smith, Alice Johnson, Bob Brown, Carol White, Dave Black, Emma Green, Frank Grey, Grace Pink, Henry
Gold, Irene Silver, Jack Orange, Karen Purple, Liam Red, Mia Blue, Noah Violet, Olivia Cyan, Peter Brown, Quinn Teal, Rachel
Lime, Steve Amber, Tina Navy, Umar Olive, Vera Rust, Will Mint, Xena Plum, Yuri Coral, Zoe Ivory, Adam Jade, Zack Blue"""


def table() -> str:
    names = [" ".join(name.split()) for name in NAMES.split(",")]
    rows = [f"| {i} | {name} | {28 + i if i < len(names) else 30} |" for i, name in enumerate(names, 1)]
    return "\n".join(["| ID | Name | Age |", "|---|---|---|", *rows])


PROMPT = f"Answer questions about this table.\n{table()}\n"
QUESTIONS = ["What is the age of John Doe? The age of John Doe is", "What is the age of Zack Blue? The age of Zack Blue is"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    seconds, cached = [], []
    with LLM(parser.parse_args().model, plugins={"prefix_caching": {}}) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=8)
        llm.generate("Warm up.", params)
        for question in QUESTIONS:
            started = time.perf_counter()
            (output,) = llm.generate(PROMPT + "Question: " + question, params)
            seconds.append(time.perf_counter() - started)
            cached.append(output.num_cached_tokens)
            print(f"Question: {question}\nAnswer: {output.outputs[0].text!r}")
            print(f"{seconds[-1]:.3f} s, {cached[-1]} of {len(output.prompt_token_ids)} prompt tokens cached")
    assert cached[1] > cached[0]
    print("The second answer was faster:", seconds[1] < seconds[0])


if __name__ == "__main__":
    main()
