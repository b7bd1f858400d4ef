"""The size budgets of this repository and what they are now: `make budgets` prints the table."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import source_tree as source


@dataclass(frozen=True)
class Budget:
    what: str
    value: float
    limit: float

    @property
    def kept(self) -> bool:
        return self.value <= self.limit


def _total(files: list[Path]) -> int:
    return sum(source.code_lines(file) for file in files)


def plugin_sizes() -> dict[str, int]:
    """Code lines of each feature plugin (plugins/*)."""
    found = source.distributions()
    return {d.folder.name: _total(source.package_files(d)) for d in found if d.folder.parent.name == "plugins"}


def hooks() -> list[str]:
    nodes = source.tree(source.KERNEL / "hookspecs.py").body
    marked = [n for n in nodes if isinstance(n, ast.FunctionDef)]
    return [n.name for n in marked if any(isinstance(d, ast.Name) and d.id == "hookspec" for d in n.decorator_list)]


def config_keys() -> list[str]:
    """Keys of kernel.toml that are the kernel's; `engine` and `plugins` are tables, not keys."""
    classes = [node for node in source.tree(source.KERNEL / "config.py").body if isinstance(node, ast.ClassDef)]
    fields = [field for node in classes for field in node.body if isinstance(field, ast.AnnAssign)]
    names = [field.target.id for field in fields if isinstance(field.target, ast.Name)]
    return [name for name in names if name not in ("engine", "plugins", "model_config")]


def function_lengths() -> dict[str, int]:
    return {name: length for file in source.all_files() for name, length in source.functions(file)}


def _lengths() -> list[int]:
    return sorted(function_lengths().values())


BUDGETS: dict[str, tuple[Callable[[], float], float]] = {
    # docs/architecture.md, Size, says why these two are what they are
    "kernel_core without nn, code lines": (lambda: _total(source.kernel_files(nn=False)), 5000),
    "kernel_core/testing, code lines": (lambda: _total(source.testing_files()), 600),
    "kernel_core/nn, code lines": (lambda: _total(source.kernel_files(nn=True)), 3375),
    "a feature plugin, code lines, median": (lambda: median(plugin_sizes().values() or [0]), 400),
    "function length, median": (lambda: median(_lengths()), 9),
    "function length, 90 %": (lambda: quantiles(_lengths(), n=10)[-1], 36),
    "function length, longest": (lambda: max(_lengths()), 80),
    "keys in the kernel's configuration": (lambda: len(config_keys()), 25),
    "hooks": (lambda: len(hooks()), 26),
}


def budget(what: str) -> Budget:
    measure, limit = BUDGETS[what]
    return Budget(what, measure(), limit)


def table() -> str:
    found = [budget(what) for what in BUDGETS]
    rows = [f"{b.what:<40} {b.value:>8g} <= {b.limit:<6g} {'ok' if b.kept else 'OVER'}" for b in found]
    sizes = [f"  plugins/{name:<30} {lines:>8}" for name, lines in sorted(plugin_sizes().items())]
    kernel = {file: source.code_lines(file) for nn in (False, True) for file in source.kernel_files(nn)}
    largest = sorted(kernel.items(), key=lambda item: -item[1])[:10]
    files = [f"  {file.relative_to(source.ROOT).as_posix():<38} {lines:>8}" for file, lines in largest]
    return "\n".join([*rows, "plugins:", *sizes, "largest files of the kernel:", *files])


if __name__ == "__main__":
    print(table())
    sys.exit(not all(budget(what).kept for what in BUDGETS))
