"""What `kernel generate` takes. Imported for its help, so it imports nothing heavy."""

from __future__ import annotations

import argparse

from kernel_core.api import add_sampling_arguments

EXAMPLES = """examples:
  kernel generate "The capital of France is" --max-tokens 16 --temperature 0
  kernel generate --chat "What does os.path.join do?" "What does math.sqrt do?"
  kernel generate --file prompts.txt --json > answers.jsonl
  git log -1 --format=%B | kernel generate --chat --whole --system "Summarise the commit in five words."
  kernel generate "Once upon" --n 3 --seed 7 --top-p 0.9 --param presence_penalty=0.5
  kernel generate "Hello" --model ./my-checkpoint --set engine.max_model_len=512 --stats
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "prompts", nargs="*", metavar="PROMPT", help="prompts; none, or -: from --file or standard input, one a line"
    )
    parser.add_argument("--file", metavar="FILE", help="read prompts from a file, one a line; - is standard input")
    parser.add_argument("--whole", action="store_true", help="the whole file or standard input is one prompt")
    parser.add_argument("--chat", action="store_true", help="send each prompt as a user message in a chat")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: a system message before each prompt")
    parser.add_argument("--chat-template", metavar="FILE", help="with --chat: a Jinja template instead of the model's")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    parser.add_argument("--stats", action="store_true", help="say on standard error how fast it was")
    add_sampling_arguments(parser)
