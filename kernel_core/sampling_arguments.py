"""The sampling options that commands share. Every other field, plugins' too, goes through `--param NAME=VALUE`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from kernel_core.errors import RequestError

_OPTIONS = (
    ("--max-tokens", int, "most tokens of an answer"),
    ("--temperature", float, "0 is greedy"),
    ("--top-p", float, "keep the most likely tokens that together have this probability"),
    ("--top-k", int, "keep this many of the most likely tokens"),
    ("--min-p", float, "keep tokens at least this likely, relative to the likeliest"),
    ("--seed", int, "the same seed gives the same answer"),
    ("--n", int, "answers to each prompt"),
)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for one `SamplingParams`; what is not given is left to the model's defaults."""
    group = parser.add_argument_group("sampling")
    for option, kind, text in _OPTIONS:
        group.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end an answer at this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end token")
    group.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other sampling field, plugins' too, for example presence_penalty=0.5 or logprobs=3; VALUE is JSON or a word",
    )


def sampling_from_arguments(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `add_sampling_arguments` parsed, as keywords of `SamplingParams.of`. Raises RequestError."""
    names = [option.removeprefix("--").replace("-", "_") for option, _, _ in _OPTIONS]
    given = {name: getattr(arguments, name) for name in (*names, "stop") if getattr(arguments, name) is not None}
    if arguments.ignore_eos:
        given["ignore_eos"] = True
    for text in arguments.param:
        name, equals, value = text.partition("=")
        if not equals:
            raise RequestError(f"--param {text}: write NAME=VALUE, for example --param presence_penalty=0.5")
        try:
            given[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            given[name.strip()] = value
    return given
