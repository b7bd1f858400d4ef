"""Offline generation: several prompts at once, one conversation, a batch of ten conversations.

python examples/01_basic.py [--model NAME] [any key of [engine], for example --max-model-len 512]
"""

import argparse
from pathlib import Path

from kernel_core import LLM, EngineConfig, SamplingParams

PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
QUESTIONS = ["os.path.join", "math.sqrt", "json.dumps", "shutil.copy", "random.shuffle"]
CONVERSATION = [
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Hello! Ask me about Python's standard library."},
    {"role": "user", "content": "What does os.path.join do?"},
]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--chat-template-path", type=Path, help="a Jinja template instead of the model's own")
    for name in EngineConfig.model_fields:
        parser.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS)
    return parser.parse_args()


def show(outputs: list) -> None:
    for output in outputs:
        print(f"Prompt:    {output.prompt!r}\nGenerated: {output.outputs[0].text!r}\n" + "-" * 60)


def generate(llm: LLM) -> None:
    print("== generate ==")
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=0)
    outputs = llm.generate(PROMPTS, params)
    assert [output.prompt for output in outputs] == PROMPTS, "one output per prompt, in order"
    show(outputs)


def chat(llm: LLM, template: str | None) -> None:
    print("== chat: one conversation ==")
    params = llm.get_default_sampling_params()
    params.temperature, params.max_tokens = 0.0, 64
    show(llm.chat(CONVERSATION, params, template=template))

    print("== chat: ten conversations at once ==")
    conversations = [[{"role": "user", "content": f"What does {name} do?"}] for name in QUESTIONS * 2]
    outputs = llm.chat(conversations, params, template=template)
    assert len(outputs) == 10
    show(outputs)


def main() -> None:
    arguments = vars(parse())
    path = arguments.pop("chat_template_path")
    with LLM(**arguments) as llm:
        print(llm.engine.summary)
        generate(llm)
        chat(llm, path.read_text() if path else None)


if __name__ == "__main__":
    main()
