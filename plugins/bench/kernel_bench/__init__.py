"""The command `kernel bench`."""

from kernel_core.api import Command

command = Command(
    name="bench",
    summary="Measure an engine: the cost of a step, and speed and latency on a model",
    arguments="kernel_bench.arguments:add_arguments",
    run="kernel_bench.run:run",
)
