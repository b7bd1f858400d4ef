"""Who may import whom, read from the source: lazy imports count as well."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest
import source_tree as source

OPEN_TO_PLUGINS = ("kernel_core.api", "kernel_core.nn.api", "kernel_core.testing", "kernel_core.nn.testing")
HEAVY = ("torch", "transformers", "safetensors", "tokenizers", "kernel_core.nn")
IMPORT_NAMES = {"huggingface-hub": "huggingface_hub", "pyyaml": "yaml", "pillow": "PIL", "pyzmq": "zmq"}
IMPORT_NAMES |= dict.fromkeys(("opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"), "opentelemetry")
DISTRIBUTIONS = source.distributions()


def _requirements(project: dict) -> set[str]:
    """Import names of everything a project declares, extras and the kernel's own requirements included."""
    optional = project.get("optional-dependencies", {}).values()
    lines = [*project.get("dependencies", []), *(line for extra in optional for line in extra)]
    names = {re.match(r"[A-Za-z0-9._-]+", line)[0].lower() for line in lines}
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def _kernel_requirements() -> set[str]:
    import tomllib

    return _requirements(tomllib.loads((source.ROOT / "pyproject.toml").read_text())["project"])


def _is_inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def forbidden_imports(distribution: source.Distribution) -> list[str]:
    """Imports of a plugin that are none of: standard library, open kernel modules, declared packages, itself."""
    declared = _requirements(distribution.project) - {"kernel_core"} | _kernel_requirements()
    declared -= {other.package for other in DISTRIBUTIONS}
    found = []
    for file in source.package_files(distribution):
        for name, line in source.imports(file):
            root = name.split(".")[0]
            fine = root in sys.stdlib_module_names or root in declared or root in ("", distribution.package)
            if not fine and not any(_is_inside(name, module) for module in OPEN_TO_PLUGINS):
                found.append(f"{file.relative_to(source.ROOT)}:{line} imports {name}")
    return found


def _top_level_imports(file: Path) -> list[str]:
    """What importing the file imports at once: not inside a function, not for type checking only."""

    def visit(node: ast.AST) -> list[str]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return []
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return [name for child in node.orelse for name in visit(child)]
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            return [f"{node.module or ''}.{alias.name}" for alias in node.names]
        return [name for child in ast.iter_child_nodes(node) for name in visit(child)]

    return visit(source.tree(file))


def _file(distribution: source.Distribution, module: str) -> Path:
    path = distribution.folder / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: d.package)
def test_plugin_imports_only_the_api_what_it_declares_and_itself(distribution: source.Distribution) -> None:
    assert forbidden_imports(distribution) == []


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: d.package)
def test_entry_point_module_is_light(distribution: source.Distribution) -> None:
    for module in distribution.entry_modules:
        heavy = [n for n in _top_level_imports(_file(distribution, module)) if any(_is_inside(n, h) for h in HEAVY)]
        assert heavy == [], f"{module} imports {heavy} when it is imported; import them inside the hook"


def test_kernel_imports_no_plugin() -> None:
    packages = {distribution.package for distribution in DISTRIBUTIONS}
    files = source.kernel_files(nn=False) + source.kernel_files(nn=True) + source.testing_files()
    found = [(file.name, name) for file in files for name, _ in source.imports(file) if name.split(".")[0] in packages]
    assert found == []


def test_kernel_without_nn_never_imports_torch() -> None:
    """Lazy imports count too; the executor alone reaches the torch side, by importing kernel_core.nn.worker when it starts."""
    found = []
    for file in source.kernel_files(nn=False) + source.testing_files():
        lazy = file.name == "executor.py"
        names = [name for name, _ in source.imports(file) if not (lazy and _is_inside(name, "kernel_core.nn.worker"))]
        names = [n for n in names if n in _runtime_imports(file) and any(_is_inside(n, h) for h in ("torch", "kernel_core.nn"))]
        found += [f"{file.relative_to(source.ROOT)} imports {name}" for name in names]
    assert found == []


def _runtime_imports(file: Path) -> set[str]:
    """Every import but those under `if TYPE_CHECKING`."""
    hidden = {
        child
        for node in ast.walk(source.tree(file))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for child in ast.walk(statement)
    }
    shown = [node for node in ast.walk(source.tree(file)) if node not in hidden]
    plain = {alias.name for node in shown if isinstance(node, ast.Import) for alias in node.names}
    return plain | {f"{n.module or ''}.{a.name}" for n in shown if isinstance(n, ast.ImportFrom) for a in n.names}


def test_the_rules_see_a_breach(tmp_path: Path) -> None:
    """The checks themselves: each kind of breach is found."""
    package = tmp_path / "kernel_bad"
    package.mkdir()
    (package / "__init__.py").write_text("import torch\nfrom kernel_core.scheduler import Scheduler\n")
    (package / "work.py").write_text("def f():\n    import requests\n    from kernel_core.api import Manifest\n")
    bad = source.Distribution(tmp_path, {"name": "kernel-bad", "dependencies": ["kernel-core"]}, "kernel_bad")
    names = [name for file in source.package_files(bad) for name, _ in source.imports(file)]
    assert "kernel_core.scheduler.Scheduler" in names and "requests" in names
    assert _top_level_imports(package / "__init__.py") == ["torch", "kernel_core.scheduler.Scheduler"]
    assert _top_level_imports(package / "work.py") == []
