"""Errors that the engine raises on purpose. Every message says what to do about it."""

from __future__ import annotations


class KernelError(Exception):
    """Base of all deliberate errors."""


class ConfigError(KernelError):
    """The configuration cannot work: unknown key or plugin, conflicting constraints, two owners of one place."""


class PluginError(KernelError):
    """A plugin named by the configuration failed to load, or broke its contract while being built."""


class RequestError(KernelError, ValueError):
    """One request is invalid. Raised to its sender only; the engine and the other requests go on."""


class CapacityError(KernelError):
    """The model, the KV cache or one maximal request does not fit into the device's memory."""


class EngineDeadError(KernelError):
    """A worker died or the loop failed: all requests ended with this error; a new engine must be started."""
