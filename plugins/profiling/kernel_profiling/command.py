"""The command `kernel profile`."""

from kernel_core.api import Command

command = Command(
    name="profile",
    summary="Show which modules and operators the time of a step goes to",
    arguments="kernel_profiling.arguments:add_arguments",
    run="kernel_profiling.run:run",
    enables=("profiling",),
)
