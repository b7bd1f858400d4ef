"""The socket that all API processes accept from."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kernel_core.api import ConfigError
from kernel_openai_server.section import ServerSection


@contextmanager
def bound(section: ServerSection) -> Iterator[socket.socket]:
    """A bound socket that does not listen yet: clients are refused until an API process accepts. Raises ConfigError."""
    _check(section)
    listener = _unix(section.uds) if section.uds is not None else _tcp(section.host, section.port)
    try:
        yield listener
    finally:
        listener.close()
        if section.uds is not None:
            Path(section.uds).unlink(missing_ok=True)


def _check(section: ServerSection) -> None:
    if (section.ssl_certfile is None) != (section.ssl_keyfile is None):
        raise ConfigError("plugins.openai_server: TLS needs both ssl_certfile and ssl_keyfile; set both or neither")
    for name in ("ssl_certfile", "ssl_keyfile"):
        path = getattr(section, name)
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigError(f"plugins.openai_server.{name} = {path!r}: there is no such file, or it cannot be read")
    if section.uds is not None and {"host", "port"} & section.model_fields_set:
        raise ConfigError("plugins.openai_server: uds serves on a Unix socket; leave out host and port, or uds")


def url(listener: socket.socket, section: ServerSection) -> str:
    """Where clients find it, with the port that the system chose."""
    scheme = "https" if section.ssl_certfile else "http"
    if section.uds is not None:
        return f"{scheme}+unix://{section.uds}{section.root_path}"
    host, port = listener.getsockname()[:2]
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}{section.root_path}"


def _tcp(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except OSError as error:
        raise ConfigError(f"plugins.openai_server.host = {host!r} is no address of this machine: {error}") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        advice = "choose another with --port (0: any free one)" if error.errno == errno.EADDRINUSE else "choose another --host"
        raise ConfigError(f"cannot serve on {host} port {port}: {os.strerror(error.errno or 0)}; {advice}") from error
    return listener


def _unix(path: str) -> socket.socket:
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot serve on the Unix socket {path}: {error}; choose another path with --uds") from error
    return listener


def _remove_stale(path: str) -> None:
    """A socket that nobody listens on was left by a server that was killed. Raises ConfigError for anything else."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConfigError(f"plugins.openai_server.uds = {path!r} is a file and no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
            return
        except OSError as error:
            raise ConfigError(f"cannot use the Unix socket {path}: {error}") from error
    raise ConfigError(f"another server serves on {path}; choose another path with --uds")
