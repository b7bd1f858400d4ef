"""What `kernel chat` takes. Imported for its help, so it imports nothing heavy."""

from __future__ import annotations

import argparse

from kernel_core.api import add_sampling_arguments

EXAMPLES = """examples:
  kernel chat
  kernel chat --system "Answer in one sentence." --temperature 0
  kernel chat --model ./my-checkpoint --set engine.max_model_len=2048

in the chat: /help, /clear (forget the conversation), /quit or Ctrl-D; Ctrl-C stops an answer
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    add_sampling_arguments(parser)
