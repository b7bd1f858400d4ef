"""Speculation with a draft model: the text of the target alone, in fewer passes of the target. Runs on any device.

python examples/14_neuron_speculation.py [--model NAME] [--draft-model NAME] [--draft-tokens 4]
"""

import argparse

from kernel_core import LLM, SamplingParams

QUESTIONS = ["What does os.path.join do?", "Explain json.dumps", "Call math.sqrt with 16", "Hello!"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--draft-model", default="tiny-draft", help="a smaller model with the same vocabulary")
    parser.add_argument("--draft-tokens", type=int, default=4, help="drafts a step")
    parser.add_argument("--max-requests", type=int, default=4, help="answered at the same time")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    params = SamplingParams(top_k=1, max_tokens=100)
    common = {"model": arguments.model, "max_model_len": 512, "max_requests": arguments.max_requests}
    with LLM(**common) as llm:
        plain = [output.outputs[0] for output in llm.chat(chats, params)]
    section = {"model": arguments.draft_model, "draft_tokens": arguments.draft_tokens, "adaptive": False}
    with LLM(**common, plugins={"draft_model": section}) as llm:
        fast = [output.outputs[0] for output in llm.chat(chats, params)]
    for question, alone, drafted in zip(QUESTIONS, plain, fast):
        passes = len(drafted.token_ids) - drafted.num_accepted
        print(f"{question}\n  {drafted.text}")
        print(f"  passes of the target: {len(alone.token_ids)} alone, {passes} with drafts")
    same = all(alone.token_ids == drafted.token_ids for alone, drafted in zip(plain, fast))
    print(f"Generated texts are the same: {same}")


if __name__ == "__main__":
    main()
