"""What `kernel profile` takes. Imported for its help, so it imports nothing heavy."""

from __future__ import annotations

import argparse

EXAMPLES = """examples:
  kernel profile --prompt-len 256 --batch-size 8 --steps 9
  kernel profile --batch-size 128 --prompt-len 16 --to-completion 32 --csv profile --json profile.json
  kernel profile --steps 4 --trace traces --html profile.html --model ./my-checkpoint

A fixed batch of random prompts is prefilled and decoded. Modules are timed in a run of their own; operators and traces come
from a second run under torch.profiler, which is slower.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EXAMPLES
    parser.add_argument("--prompt-len", type=int, default=256, metavar="N", help="tokens of each prompt (256)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="requests (1)")
    how_long = parser.add_mutually_exclusive_group()
    how_long.add_argument("--steps", type=int, metavar="N", help="steps to run; 1 is the prefill only (2)")
    how_long.add_argument(
        "--to-completion", type=int, metavar="N", help="decode until all are done, N requests fewer in each step, the last alone"
    )
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="runs before the one that is measured (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the random prompts (0)")
    parser.add_argument("--operators", action="store_true", help="also print the table of operators and device kernels")
    parser.add_argument("--layers", action="store_true", help="print every layer, not the layers together")
    parser.add_argument("--min-percent", type=float, default=0.5, metavar="P", help="do not print rows below this share (0.5)")
    parser.add_argument("--csv", metavar="PREFIX", help="write PREFIX_{prefill,decode}_{model,summary}_table.csv")
    parser.add_argument("--json", metavar="FILE", help="write all steps; - is standard output")
    parser.add_argument("--trace", metavar="FOLDER", help="write a Chrome trace of each step: prefill.json, decode_1.json, ...")
    parser.add_argument("--html", metavar="FILE", help="write a picture of where the time goes")
