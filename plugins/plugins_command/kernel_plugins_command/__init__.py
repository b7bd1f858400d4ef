"""`kernel plugins`: what is installed, what takes part, and why."""

from kernel_core.api import Command

command = Command(
    name="plugins",
    summary="List what is installed, and explain what a configuration starts",
    arguments="kernel_plugins_command.run:add_arguments",
    run="kernel_plugins_command.run:run",
)
