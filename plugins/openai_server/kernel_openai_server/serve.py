"""`kernel serve`."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from kernel_core.api import KernelConfig, ResolvedPlan, config_from_arguments, inspect_model, resolve
from kernel_openai_server import listener
from kernel_openai_server.arguments import FLAGS
from kernel_openai_server.section import NAME, ServerSection, section_of
from kernel_openai_server.supervise import Supervisor

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def run(arguments: argparse.Namespace) -> int:
    """0: stopped by a signal; 1: the engine did not start, or something died too often. Raises ConfigError and PluginError
    before anything starts."""
    plan = resolve(with_flags(config_from_arguments(arguments), vars(arguments)))
    section = section_of(plan.config)
    model = inspect_model(plan)
    with listener.bound(section) as socket:
        where = listener.url(socket, section)

        def announce(summary: str) -> None:
            sys.stdout.write(banner(plan, section, where, summary))
            sys.stdout.flush()

        return asyncio.run(Supervisor(plan, model, section, socket, announce).run())


def with_flags(config: KernelConfig, given: Mapping[str, Any]) -> KernelConfig:
    """The flags of the command over the section of the file."""
    flags = {name: given[name] for name in FLAGS if given.get(name) is not None}
    section = config.plugins.get(NAME)
    own = section if isinstance(section, dict) else {}
    return config.model_copy(update={"plugins": {**config.plugins, NAME: {**own, **flags}}})


def banner(plan: ResolvedPlan, section: ServerSection, where: str, summary: str) -> str:
    names = section.served_model_name or (plan.config.model,)
    processes = f" ({section.api_processes} API processes)" if section.api_processes > 1 else ""
    lines = {
        f"kernel {version('kernel-core')}": summary,
        "model": ", ".join(names),
        "device": plan.device.name,
        "plugins": ", ".join(entry.name for entry in plan.plugins),
        "serving": where + processes,
    }
    text = "".join(f"{name + ':':14} {value}\n" for name, value in lines.items())
    open_to_all = section.uds is None and section.host not in LOOPBACK and not (section.api_keys or os.environ.get(KEY))
    return text + (OPEN if open_to_all else "")


KEY = "KERNEL_API_KEY"
OPEN = "warning:       anybody who can reach this address can use it: set --api-key, or plugins.openai_server.api_keys\n"
