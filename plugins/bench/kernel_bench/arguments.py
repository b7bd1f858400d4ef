"""What `kernel bench` takes. Imported for its help, so it imports nothing heavy."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  kernel bench step --running 256
  kernel bench step --running 1024 --churn 0.02 --plugins priority --json
  kernel bench run --workload a --workload b --model ./my-checkpoint
  kernel bench run --quick --json

step: host milliseconds of plan and commit, and microseconds of dispatch around them, with a device that computes nothing.
run: tokens a second, time to first token, memory and start-up time of the configured engine on random prompts.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("what", choices=("step", "run"), help="what to measure")
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
    run.add_argument("--quick", action="store_true", help="a tenth of everything, for a first look")
