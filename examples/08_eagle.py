"""Speculation with EAGLE heads: how many drafts the target accepted, at each place of a step.

python examples/08_eagle.py [--method eagle|eagle3] [--tree] [--draft-tokens 3] [--dataset questions.jsonl]
A data set has one JSON object a line, of which the first entry of "turns" is asked.
"""

import argparse
import json
from pathlib import Path

from kernel_core import LLM, SamplingParams

QUESTIONS = ["What does os.path.join do?", "Explain textwrap.dedent", "What is random.shuffle for?", "Call math.sqrt with 16"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--method", choices=["eagle", "eagle3"], default="eagle3")
    parser.add_argument("--head", help="the head: a folder, hub id or embedded name (tiny-chat-METHOD)")
    parser.add_argument("--tree", action="store_true", help="draft a dynamic tree instead of a chain")
    parser.add_argument("--draft-tokens", type=int, default=3, help="drafts a step")
    parser.add_argument("--dataset", type=Path, help="a file of questions, one JSON object a line")
    parser.add_argument("--num-prompts", type=int, default=80)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-requests", type=int, default=8, help="answered at the same time")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--print-output", action="store_true")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    questions = QUESTIONS
    if arguments.dataset:
        questions = [json.loads(line)["turns"][0] for line in arguments.dataset.read_text().splitlines() if line.strip()]
    chats = [[{"role": "user", "content": question}] for question in questions[: arguments.num_prompts]]
    section = {
        "head": arguments.head or f"tiny-chat-{arguments.method}",
        "method": arguments.method,
        "tree": arguments.tree,
        "draft_tokens": arguments.draft_tokens,
        "adaptive": False,
    }
    params = SamplingParams(temperature=arguments.temperature, max_tokens=arguments.max_tokens)
    with LLM(arguments.model, max_model_len=512, max_requests=arguments.max_requests, plugins={"eagle": section}) as llm:
        outputs = llm.chat(chats, params)
        drafts = llm.draft_counts
    if arguments.print_output:
        for chat, output in zip(chats, outputs):
            print(f"{chat[0]['content']}\n  {output.outputs[0].text}")
    print("-" * 50)
    print(f"output tokens: {sum(len(output.outputs[0].token_ids) for output in outputs)}")
    print(f"verifications with drafts: {drafts.steps}")
    print(f"drafted tokens: {drafts.drafted}")
    print(f"accepted tokens: {drafts.accepted}")
    print(f"mean accepted length: {drafts.mean_length:.2f}")
    for place, count in enumerate(drafts.by_place):
        print(f"accepted at place {place}: {count / drafts.steps:.2f}")


if __name__ == "__main__":
    main()
