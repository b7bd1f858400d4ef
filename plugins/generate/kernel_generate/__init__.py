"""The command `kernel generate`."""

from kernel_core.api import Command

command = Command(
    name="generate",
    summary="Answer prompts from the command line, a file or standard input",
    arguments="kernel_generate.arguments:add_arguments",
    run="kernel_generate.run:run",
)
