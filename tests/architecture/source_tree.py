"""Reads this repository's source: distributions, files, code lines, functions, imports. Standard library only."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KERNEL = ROOT / "kernel_core"
GROUPS = ("plugins", "hw", "models")
ENTRY_POINT_GROUPS = ("plugins", "devices", "models", "commands", "checkpoints")
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Distribution:
    """One folder with a pyproject.toml. `package` is what it imports as."""

    folder: Path
    project: dict
    package: str

    @property
    def entry_modules(self) -> list[str]:
        """The light modules that its entry points name."""
        points = self.project.get("entry-points", {})
        values = [value for group in ENTRY_POINT_GROUPS for value in points.get(f"kernel_core.{group}", {}).values()]
        return sorted({value.split(":")[0] for value in values})


def distributions() -> list[Distribution]:
    """Every distribution under plugins/, hw/ and models/."""
    files = [file for group in GROUPS for file in sorted((ROOT / group).glob("*/pyproject.toml"))]
    return [_distribution(file) for file in files]


def _distribution(file: Path) -> Distribution:
    content = tomllib.loads(file.read_text())
    backend = content.get("tool", {}).get("uv", {}).get("build-backend", {})
    package = backend.get("module-name", content["project"]["name"].replace("-", "_"))
    return Distribution(file.parent, content["project"], package)


def kernel_files(nn: bool) -> list[Path]:
    """The kernel's files: of kernel_core/nn, or of the rest; `kernel_core/testing` is the authors' kit and is in neither."""
    parts = {file: file.relative_to(KERNEL).parts for file in sorted(KERNEL.rglob("*.py"))}
    return [file for file, path in parts.items() if ("nn" in path) == nn and "testing" not in path]


def testing_files() -> list[Path]:
    return sorted((KERNEL / "testing").rglob("*.py"))


def package_files(distribution: Distribution) -> list[Path]:
    return sorted((distribution.folder / distribution.package).rglob("*.py"))


def all_files() -> list[Path]:
    folders = ("kernel_core", *GROUPS, "tests", "examples")
    return [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")) if "build" not in file.parts]


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def module_name(file: Path, base: Path) -> str:
    parts = file.relative_to(base).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstring(node: ast.AST) -> ast.Expr | None:
    body = getattr(node, "body", None)
    if not isinstance(body, list) or not body or not isinstance(body[0], ast.Expr):
        return None
    value = body[0].value
    return body[0] if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def docstring_lines(file: Path) -> set[int]:
    found = (_docstring(node) for node in ast.walk(tree(file)))
    return {line for doc in found if doc for line in range(doc.lineno, (doc.end_lineno or doc.lineno) + 1)}


def code_lines(file: Path) -> int:
    """Lines that hold code: no blank line, comment or docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(file.read_text()).readline)
    used = {line for token in tokens if token.type not in _LAYOUT for line in range(token.start[0], token.end[0] + 1)}
    return len(used - docstring_lines(file))


def functions(file: Path) -> Iterator[tuple[str, int]]:
    """(name, lines from `def` to the end, without the docstring) of every function, nested ones too."""
    for node in ast.walk(tree(file)):
        if isinstance(node, Function):
            doc = _docstring(node)
            doc_lines = (doc.end_lineno or 0) - doc.lineno + 1 if doc else 0
            yield f"{file.relative_to(ROOT)}:{node.name}", (node.end_lineno or 0) - node.lineno + 1 - doc_lines


def imports(file: Path) -> Iterator[tuple[str, int]]:
    """(imported module, line), lazy imports included. `from a import b` gives "a.b": b may be a module."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from ((f"{'.' * node.level}{base}.{name.name}", node.lineno) for name in node.names)


def words(text: str) -> set[str]:
    """Lower-case words of an identifier or sentence; camel case and underscores are boundaries, digits stay."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    return {word.lower() for word in re.findall(r"[A-Za-z][A-Za-z0-9]*", spaced.replace("_", " "))}


def vocabulary(file: Path) -> Iterator[tuple[str, int]]:
    """(word, line) of every identifier, attribute, argument, import and string, docstrings included."""
    for node in ast.walk(tree(file)):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "asname", "module")]
        if isinstance(node, ast.Constant):
            names.append(node.value)
        for name in names:
            if isinstance(name, str):
                yield from ((word, getattr(node, "lineno", 0)) for word in words(name))
