"""Speculation with an MLP speculator: seconds per token without and with it, after warming up; the text is the same.

python examples/09_mlpspeculator.py [--model NAME] [--head NAME] [--tree] [--max-tokens 200]
"""

import argparse
import time

from kernel_core import LLM, SamplingParams

QUESTIONS = ["os.path.join", "textwrap.dedent", "shutil.copy", "json.dumps", "random.shuffle", "os.listdir"]
WARM_UPS = 2


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--head", default="tiny-chat-mlp", help="the speculator of that model: a folder, hub id or embedded name")
    parser.add_argument("--tree", action="store_true", help="draft a tree of candidates instead of a chain")
    parser.add_argument("--max-tokens", type=int, default=200)
    return parser.parse_args()


def measure(title: str, arguments: argparse.Namespace, plugins: dict) -> list[str]:
    """Answers one question at a time, greedily, and prints the seconds that a token took."""
    params = SamplingParams(temperature=0, max_tokens=arguments.max_tokens)
    with LLM(arguments.model, max_model_len=512, plugins=plugins) as llm:
        chats = [[{"role": "user", "content": f"What does {name} do?"}] for name in QUESTIONS]
        for _ in range(WARM_UPS):
            llm.chat(chats[0], params)
        start = time.perf_counter()
        outputs = [llm.chat(chat, params)[0].outputs[0] for chat in chats]
        seconds = time.perf_counter() - start
    tokens = sum(len(output.token_ids) for output in outputs)
    print(f"{title}: {seconds / tokens:.6f} seconds per token")
    return [output.text for output in outputs]


def main() -> None:
    arguments = parse()
    section = {"head": arguments.head, "tree": arguments.tree}
    plain = measure("Without speculation", arguments, {})
    fast = measure("With the speculator", arguments, {"mlp_speculator": section})
    for question, text in zip(QUESTIONS, fast):
        print(f"{question}: {text}")
    print(f"Generated texts are the same: {plain == fast}")


if __name__ == "__main__":
    main()
