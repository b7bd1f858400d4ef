"""What `kernel bench` takes. Imported for its help, so it imports nothing heavy."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  kernel bench step --running 256
  kernel bench step --running 1024 --churn 0.02 --plugins priority --json
  kernel bench run --workload a --workload b --model ./my-checkpoint
  kernel bench run --quick --json
  kernel bench serve --url http://127.0.0.1:8000 --rate 8 --requests 400 --goal ttft=0.5 --goal tpot=0.05 --plot load.svg
  kernel bench serve --concurrency 32 --mix documents --shared-prefix 500 --prefix-groups 4 --output load.json

step: host milliseconds of plan and commit, and microseconds of dispatch around them, with a device that computes nothing.
run: tokens a second, time to first token, memory and start-up time of the configured engine on random prompts.
serve: load on a server that runs, this one or any with the OpenAI API. ttft: until the first piece of an answer; tpot: mean time
of a token after it; itl: between two pieces of a stream; e2e: the whole request. Goodput counts requests that keep every --goal.
client_late_ms says how late requests were sent: where it is large, this program was the limit, not the server.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("what", choices=("step", "run", "serve"), help="what to measure")
    parser.add_argument("--json", action="store_true", help="print JSON")
    step = parser.add_argument_group("step")
    step.add_argument("--running", type=int, default=256, metavar="N", help="requests running at once (256)")
    step.add_argument("--churn", type=float, default=0.0, metavar="SHARE", help="share of them replaced in each step (0)")
    step.add_argument("--steps", type=int, default=400, metavar="N", help="steps to measure (400)")
    step.add_argument("--plugins", default="", metavar="A,B", help="plugins whose engine parts take part")
    run = parser.add_argument_group("run")
    run.add_argument("--workload", action="append", metavar="NAME", help="a, b or c; may be repeated (all of them)")
    run.add_argument("--repeat", type=int, default=1, metavar="N", help="measure each workload so often, print the fastest (1)")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the random prompts (0)")
    add_serve(parser.add_argument_group("serve"))
    run.add_argument("--quick", action="store_true", help="a tenth of everything, for a first look")


def add_serve(serve: argparse._ArgumentGroup) -> None:
    number = {"type": int, "metavar": "N"}
    serve.add_argument("--url", default="http://127.0.0.1:8000", help="the server (http://127.0.0.1:8000)")
    serve.add_argument("--api-key", metavar="KEY", help="better: the environment variable KERNEL_API_KEY")
    serve.add_argument("--served-model", metavar="NAME", help="as the server calls it (the first that it lists)")
    serve.add_argument("--api", choices=("chat", "completions"), default="chat", help="which route (chat)")
    serve.add_argument("--requests", default=200, help="how many (200)", **number)
    serve.add_argument("--rate", type=float, metavar="R", help="open loop: so many a second, at random times (all at once)")
    serve.add_argument("--burstiness", type=float, default=1.0, metavar="X", help="1: a Poisson process; smaller: burstier (1)")
    serve.add_argument("--concurrency", help="closed loop instead: so many clients, each waits for its answer", **number)
    serve.add_argument("--mix", choices=("chat", "documents", "writing"), default="chat", help="lengths, log-normal (chat)")
    serve.add_argument("--prompt-len", type=float, metavar="N", help="mean words of a prompt, instead of the mix's")
    serve.add_argument("--output-len", type=float, metavar="N", help="mean tokens of an answer, instead of the mix's")
    serve.add_argument("--spread", type=float, metavar="X", help="sigma of the logarithm of lengths; 0: all are equal")
    serve.add_argument("--longest", default=100_000, help="the most words and tokens of one request", **number)
    serve.add_argument("--shared-prefix", default=0, help="words that all prompts of a group begin with (0)", **number)
    serve.add_argument("--prefix-groups", default=1, help="different prefixes (1)", **number)
    serve.add_argument("--dataset", metavar="FILE", help='prompts from JSON lines with "prompt" or "turns"')
    serve.add_argument("--temperature", type=float, default=0.7, metavar="T", help="of all requests (0.7)")
    serve.add_argument("--respect-eos", action="store_true", help="answers may end early (without: ignore_eos is sent)")
    serve.add_argument(
        "--goal", action="append", default=[], metavar="NAME=S", help="ttft, tpot or e2e: the most seconds; repeatable"
    )
    serve.add_argument("--plot", metavar="FILE", help="write a picture (SVG)")
    serve.add_argument("--output", metavar="FILE", help="write the figures (JSON)")
