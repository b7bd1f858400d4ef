"""What `kernel run-batch` takes. Imported for its help, so it imports nothing heavy."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  kernel run-batch -i requests.jsonl -o answers.jsonl -m tiny-chat
  kernel run-batch -i https://host/requests.jsonl -o https://host/upload?signature=... -m ./my-checkpoint --output-tmp-dir work

A line of the input: {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [...]}}
An interrupted run goes on where it stopped when it is started again. Exit code 1: some lines got an error.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument(
        "-i", "--input-file", required=True, metavar="FILE", help="requests, one JSON object a line; or an http(s) URL"
    )
    parser.add_argument(
        "-o", "--output-file", required=True, metavar="FILE", help="answers, in the order of the requests; or a URL"
    )
    parser.add_argument("-m", dest="model", metavar="NAME", default=argparse.SUPPRESS, help="the same as --model")
    parser.add_argument("--output-tmp-dir", metavar="FOLDER", help="where answers are kept until they are uploaded (.)")
    parser.add_argument("--concurrency", type=int, metavar="N", help="requests at once (plugins.openai_batch.concurrency)")
    parser.add_argument("--restart", action="store_true", help="forget the answers of earlier runs")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
