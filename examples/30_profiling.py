"""Which modules and operators the time of a step goes to: a fixed batch, prefill and decode apart.

python examples/30_profiling.py run_num_steps -n 2 [--prompt-len 64] [--batch-size 4] [--csv PREFIX] [--json FILE]
python examples/30_profiling.py run_to_completion -n 2 --batch-size 8 [--save-chrome-traces-folder FOLDER] [--html FILE]

run_num_steps: n steps, of which the first is the prefill. run_to_completion: n requests end at each decode step, and the last
step has one request. `kernel profile` is the same as a command.
"""

import argparse
import sys

from kernel_core.cli import main as kernel


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", nargs="?", default="run_num_steps", choices=["run_num_steps", "run_to_completion"])
    parser.add_argument("-n", type=int, default=2, help="steps, or requests that end at each step")
    parser.add_argument("--model", default="tiny-chat")
    parser.add_argument("--prompt-len", default="64")
    parser.add_argument("--batch-size", default="4")
    for option in ("--csv", "--json", "--save-chrome-traces-folder", "--html"):
        parser.add_argument(option)
    given = parser.parse_args()
    how = "--steps" if given.how == "run_num_steps" else "--to-completion"
    command = ["profile", "--model", given.model, "--prompt-len", given.prompt_len, "--batch-size", given.batch_size]
    command += [how, str(given.n), "--operators", "--min-percent", "2"]
    files = {"--csv": given.csv, "--json": given.json, "--trace": given.save_chrome_traces_folder, "--html": given.html}
    return kernel([*command, *(word for option, path in files.items() if path for word in (option, path))])


if __name__ == "__main__":
    sys.exit(main())
