"""`kernel chat`: talk with a model in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import sys

from rich.console import Console

from kernel_chat.conversation import Conversation
from kernel_core.api import (
    AsyncEngine,
    RequestError,
    RequestOutput,
    config_from_arguments,
    sampling_from_arguments,
)

HELP = """[bold]/help[/] this text   [bold]/clear[/] forget the conversation   [bold]/quit[/] or Ctrl-D end
Ctrl-C stops an answer; what was said so far stays in the conversation."""


class Terminal:
    """Reads lines, writes answers as they come."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def read(self) -> str | None:
        """The next line; None: the end."""
        try:
            return self.console.input("[bold cyan]> [/]" if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            self.console.print("\n[dim]/quit or Ctrl-D ends[/]")
            return ""

    async def answer(self, conversation: Conversation, text: str) -> RequestOutput:
        shown = 0
        async for output in conversation.ask(text):
            new = output.outputs[0].text[shown:]
            self.console.print(new, end="", markup=False, highlight=False, soft_wrap=True)
            shown += len(new)
        self.console.print()
        return output

    def speed(self, output: RequestOutput) -> None:
        timings, count = output.timings, len(output.outputs[0].token_ids)
        if self.console.is_terminal and timings.finished and timings.first_token is not None:
            self.console.print(
                f"[dim]{count} tokens, {count / timings.finished:.1f} tokens/s, first after {timings.first_token * 1e3:.0f} ms[/]"
            )


def run(arguments: argparse.Namespace) -> int:
    sampling = {"max_tokens": None, **sampling_from_arguments(arguments)}
    if sampling.get("n", 1) != 1:
        raise RequestError("a chat has one answer at a time: leave --n out (kernel generate --chat --n gives several)")
    console = Console(highlight=False)
    engine = AsyncEngine(config_from_arguments(arguments))
    try:
        sys.stderr.write(engine.summary + "\n")
        talk(Terminal(console), Conversation(engine, arguments.system, sampling))
    finally:
        engine.close()
    return 0


def talk(terminal: Terminal, conversation: Conversation) -> None:
    """Until /quit or the end of input."""
    if terminal.console.is_terminal:
        terminal.console.print(HELP)
    while (line := terminal.read()) is not None and line != "/quit":
        if line == "/clear":
            conversation.clear()
        elif line.startswith("/"):
            terminal.console.print(HELP if line == "/help" else f"there is no {line.split()[0]}\n{HELP}")
        elif line:
            reply(terminal, conversation, line)


def reply(terminal: Terminal, conversation: Conversation, line: str) -> None:
    """One answer. Ctrl-C stops it and nothing else."""
    try:
        output = asyncio.run(terminal.answer(conversation, line))
    except KeyboardInterrupt:
        terminal.console.print("\n[dim]stopped[/]")
    except RequestError as error:
        terminal.console.print(str(error), style="red", markup=False)
    else:
        if output.error:
            terminal.console.print(output.error, style="red", markup=False)
        terminal.speed(output)
