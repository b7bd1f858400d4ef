"""What is taught: public functions of the standard library with their signatures and first docstring lines."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import json
import pkgutil
import re
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

STORE = Path(__file__).resolve().parents[1] / "kernel_tiny" / "functions.json"
WANTED = 1600
# Platform-dependent, deprecated, private to CPython, or the same functions again under another name.
SKIPPED = set(Path(__file__).with_name("skipped_modules.txt").read_text().split())
CLASSES = (str, list, dict, set, int, float, tuple, bytes, frozenset, complex, Path, deque, Counter)
BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Function:
    """One function: `parameters` are the names that can be given by position, `required` how many must be."""

    name: str
    signature: str
    doc: str
    parameters: list[str]
    required: int


def first_line(thing: Any) -> str:
    """The first line of `inspect.getdoc`, or an empty string."""
    doc = inspect.getdoc(thing) or ""
    return doc.strip().split("\n")[0].strip()


def _import(name: str) -> ModuleType | None:
    quiet = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.suppress(ImportError):
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
    return None


def modules() -> list[tuple[str, ModuleType]]:
    """Public modules of the standard library, packages before what is inside them."""
    top = [name for name in sys.stdlib_module_names if name not in SKIPPED and not name.startswith("_")]
    found = {name: module for name in top if (module := _import(name))}
    for name, package in list(found.items()):
        for inner in pkgutil.iter_modules(getattr(package, "__path__", [])):
            if not inner.name.startswith("_") and "test" not in inner.name and (module := _import(f"{name}.{inner.name}")):
                found[f"{name}.{inner.name}"] = module
    found["os.path"] = importlib.import_module("os.path")
    return sorted(found.items(), key=lambda item: (item[0].count(".") - (item[0] == "os.path"), item[0]))


def _belongs(thing: Any, module: ModuleType, name: str) -> bool:
    home = (getattr(thing, "__module__", None) or name).partition(".")[0].lstrip("_")
    return hasattr(module, "__all__") or home in (name.partition(".")[0], "posix", "posixpath", "genericpath")


def _candidates() -> Iterator[tuple[str, Any]]:
    builtins = importlib.import_module("builtins")
    for key in sorted(k for k in vars(builtins) if k[0] != "_" and inspect.isroutine(getattr(builtins, k))):
        yield key, getattr(builtins, key)
    for name, module in modules():
        for key in sorted(getattr(module, "__all__", vars(module))):
            thing = getattr(module, key, None)
            if not key.startswith("_") and inspect.isroutine(thing) and _belongs(thing, module, name):
                yield f"{name}.{key}", thing
    for kind in CLASSES:
        for key in sorted(k for k in vars(kind) if k[0] != "_" and callable(getattr(kind, k))):
            home = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
            yield f"{home}{kind.__name__}.{key}", getattr(kind, key)


def _signature(name: str, thing: Any) -> tuple[str, list[str], int]:
    try:
        found = inspect.signature(thing)
    except (TypeError, ValueError):
        return "", [], 0
    if " at 0x" in str(found) or "<" in str(found):
        return "", [], 0
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values() if p.name != "self"]
    text = re.sub(r", /|/, |^\(/\)", "", str(inspect.Signature(plain)))
    named = [p for p in plain if p.kind in (*BY_PLACE, inspect.Parameter.KEYWORD_ONLY)]
    required = sum(p.default is inspect.Parameter.empty for p in named)
    return name + text, [p.name for p in named if p.kind in BY_PLACE], required


def _good(name: str, doc: str) -> bool:
    """A first line that reads as a sentence: not a signature, not half a page, and not another machine's path."""
    last = name.rsplit(".", 1)[-1]
    if len(name) > 45 or not 2 <= len(doc.split()) <= 20 or len(doc) > 110 or not doc.isascii():
        return False
    return not doc.startswith((f"{last}(", f"{name}(", "partial(")) and "->" not in doc and "Deprecated" not in doc


def collect(wanted: int = WANTED) -> list[Function]:
    """The first `wanted` good functions, each under one name only, sorted by name."""
    chosen: dict[str, Function] = {}
    seen: set[int] = set()
    keep = []
    for name, thing in _candidates():
        doc = first_line(thing)
        if len(chosen) < wanted and id(thing) not in seen and _good(name, doc):
            seen.add(id(thing))
            keep.append(thing)  # an id is only unique while its object lives
            chosen.setdefault(name, _described(name, thing, doc))
    return sorted(chosen.values(), key=lambda function: function.name)


def _described(name: str, thing: Any, doc: str) -> Function:
    signature, parameters, required = _signature(name, thing)
    return Function(name, signature if len(signature) <= 60 else "", doc, parameters[:6], required)


def save(functions: list[Function]) -> None:
    rows = ",\n".join(json.dumps(list(asdict(function).values())) for function in functions)
    STORE.write_text(f"[\n{rows}\n]\n")


def load() -> list[Function]:
    """The functions as they were taught, whatever Python runs now."""
    return [Function(*row) for row in json.loads(STORE.read_text())]


if __name__ == "__main__":
    save(collect())
