"""The command `kernel chat`."""

from kernel_core.api import Command

command = Command(
    name="chat",
    summary="Talk with a model in the terminal",
    arguments="kernel_chat.arguments:add_arguments",
    run="kernel_chat.run:run",
)
