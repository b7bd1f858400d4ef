"""`LLM.start_profile` and `LLM.stop_profile`, and what the command and the routes use of the worker's calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kernel_core.api import RequestError, decode, encode
from kernel_profiling.records import Answer, Mode, Profile, Start

Call = Callable[..., list[bytes]]


def start_profile(call: Call, prefix: str = "") -> None:
    """Trace the steps from now on, on every rank. Names of the files begin with `prefix` (letters, digits, - and _). Raises
    RequestError when one runs already, or no directory is configured."""
    start(call, "trace", prefix=prefix)


def stop_profile(call: Call) -> list[str]:
    """→ the files of all ranks, on their machines: a gzipped Chrome trace and a picture each; none when no step ran. Raises
    RequestError when none runs."""
    return [path for profile in stop(call) for path in profile.files]


def start(call: Call, mode: Mode, prefix: str = "", max_steps: int | None = None) -> None:
    """Raises RequestError with what the worker says."""
    _answers(call("profiling.start", encode(Start(mode, prefix, max_steps))))


def stop(call: Call) -> list[Profile]:
    """One of each rank. Raises RequestError."""
    return [answer.profile for answer in _answers(call("profiling.stop", b"")) if answer.profile is not None]


def _answers(found: Any) -> list[Answer]:
    answers = [decode(data, Answer) for data in found]
    errors = [answer.error for answer in answers if answer.error is not None]
    if errors:
        raise RequestError(errors[0])
    return answers
