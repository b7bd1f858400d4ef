"""The program `kernel`. Its help is made from metadata; running a command imports that command only."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kernel_core.discovery import Installed, did_you_mean, load, load_value, profile_data
from kernel_core.errors import ConfigError, KernelError, PluginError

if TYPE_CHECKING:
    from kernel_core.manifest import Command

USAGE = "usage: kernel [--help] [--version] COMMAND ..."
FAILED, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """→ exit code: 0, what the command returns, 2 for a deliberate error (one message on stderr; `--traceback` shows where),
    130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(help_text(Installed()))
        return 0
    if arguments[0] == "--version":
        from importlib.metadata import version

        sys.stdout.write(f"kernel {version('kernel-core')}\n")
        return 0
    return _guarded(arguments[0], arguments[1:])


def help_text(installed: Installed) -> str:
    """From the distributions' metadata; imports no plugin."""
    commands = installed.all("command")
    width = max((len(found.name) for found in commands), default=0)
    lines = [f"  {found.name:{width}}  {found.summary}" for found in commands]
    body = "\n".join(lines) or "  none is installed; for example: pip install " + profile_data()["commands"]["generate"]
    return f"{USAGE}\n\nAn LLM inference engine built of plugins.\n\ncommands:\n{body}\n\n`kernel COMMAND --help` says more.\n"


def _guarded(name: str, rest: Sequence[str]) -> int:
    try:
        return run_command(name, rest)
    except KernelError as error:
        if "--traceback" in rest:
            raise
        sys.stderr.write(f"kernel {name}: {error}\n")
        return FAILED
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe went away; keep the interpreter from flushing into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def run_command(name: str, rest: Sequence[str]) -> int:
    """Import the command, parse its arguments and the common ones (--config, --model, --device, --set), run it. The namespace
    has `enable`, the plugins the command enables; `config_from_arguments` reads both. Raises ConfigError for an unknown command
    and what the command raises."""
    command = _find(name)
    from kernel_core.settings import add_arguments

    parser = argparse.ArgumentParser(prog=f"kernel {name}", description=command.summary)
    add_arguments(parser)
    load_value(command.arguments)(parser)
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    namespace = parser.parse_args(rest)
    namespace.enable = command.enables
    return int(load_value(command.run)(namespace) or 0)


def _find(name: str) -> Command:
    installed = Installed()
    found = installed.get("command", name)
    if found is None:
        known = profile_data()["commands"]
        if name in known:
            raise ConfigError(f"this command is not installed: pip install {known[name]}")
        raise ConfigError(f"there is no such command{did_you_mean(name, installed.names('command'))} (kernel --help lists them)")
    command = load(found)
    if not hasattr(command, "run"):
        raise PluginError(f"{found.title}: {found.module!r} is a {type(command).__name__}, not a Command")
    return command
