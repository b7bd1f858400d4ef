"""The command `kernel run-batch`."""

from kernel_core.api import Command

command = Command(
    name="run-batch",
    summary="Answer a file of requests in the OpenAI batch format",
    arguments="kernel_openai_batch.arguments:add_arguments",
    run="kernel_openai_batch.run:run",
    enables=("openai_server", "openai_batch"),
)
