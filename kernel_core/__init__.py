"""An LLM inference engine as a microkernel. Everything that users need is here; plugins import `kernel_core.api`.

Importing this module imports nothing else; each name is loaded when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernel_core.async_engine import AsyncEngine
    from kernel_core.config import EngineConfig, KernelConfig
    from kernel_core.engine import Engine
    from kernel_core.errors import CapacityError, ConfigError, EngineDeadError, KernelError, PluginError, RequestError
    from kernel_core.llm import LLM
    from kernel_core.request import CompletionOutput, Logprob, RequestOutput, SamplingParams

_HOMES = {
    "async_engine": ("AsyncEngine",),
    "config": ("EngineConfig", "KernelConfig"),
    "engine": ("Engine",),
    "errors": ("CapacityError", "ConfigError", "EngineDeadError", "KernelError", "PluginError", "RequestError"),
    "llm": ("LLM",),
    "request": ("CompletionOutput", "Logprob", "RequestOutput", "SamplingParams"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "AsyncEngine",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineDeadError",
    "KernelConfig",
    "KernelError",
    "Logprob",
    "PluginError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
