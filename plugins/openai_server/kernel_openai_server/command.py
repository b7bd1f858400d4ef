"""The command `kernel serve`."""

from kernel_core.api import Command

command = Command(
    name="serve",
    summary="Serve a model over HTTP with the OpenAI API",
    arguments="kernel_openai_server.arguments:add_arguments",
    run="kernel_openai_server.serve:run",
    enables=("openai_server",),
)
