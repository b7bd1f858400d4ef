"""Writes docs/hooks.md from the source of the hook specifications and of the protocols they return.

python -m kernel_core.testing.hook_docs          writes the file
python -m kernel_core.testing.hook_docs --check  exits with 1 when it is stale
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import kernel_core

SOURCE = Path(kernel_core.__file__).parent
TARGET = SOURCE.parent / "docs" / "hooks.md"
INTRODUCTION = """# Hooks

Generated from `kernel_core/hookspecs.py` and the protocols; do not edit: `python -m kernel_core.testing.hook_docs`
writes it again.

A plugin implements a hook by a function of the same name, marked `@hookimpl`, in its entry-point module; it names those
of the arguments that it needs. Every hook is called at **build**, never in a step. What it returns is an object with the
methods of a protocol; each method's documentation states its rate: *build* (once), *request* (once per request), *step*
(once per step), *graph* (inside the compiled graph).

*Home* is the part of a plugin in which a hook is called: **face** (each process that takes requests), **engine** (one),
**worker** (each rank). *Composes* says how the answers of several plugins go together: **all** are used; **chain** in
resolved order; **exclusive**: one plugin at most; **keyed**: chosen by a key or a predicate; **one owner a name**.
"""


def document() -> str:
    """The whole text."""
    hooks = list(_hooks(ast.parse((SOURCE / "hookspecs.py").read_text())))
    classes = {node.name: node for node in _protocols()}
    rows = [f"| [`{h.name}`](#{h.name}) | {_homes(h)} | {_composes(h)} | {_returns(h, classes)} |" for h in hooks]
    used = [name for name in classes if any(name in _names(hook.returns) for hook in hooks)]
    parts = [INTRODUCTION, "| hook | home | composes | returns |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"]
    parts += [_hook_section(hook, classes) for hook in hooks]
    parts += ["# What hooks return\n", *(_protocol_section(classes[name]) for name in used)]
    return "\n".join(parts)


def _hooks(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "hookspec" for d in node.decorator_list):
            yield node


def _protocols() -> Iterator[ast.ClassDef]:
    for file in ("protocols.py", "nn/protocols.py"):
        for node in ast.parse((SOURCE / file).read_text()).body:
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "Protocol" for base in node.bases):
                yield node


def _home(hook: ast.FunctionDef) -> ast.Call:
    return next(d for d in hook.decorator_list if isinstance(d, ast.Call) and ast.unparse(d.func) == "home")


def _homes(hook: ast.FunctionDef) -> str:
    return ", ".join(ast.literal_eval(argument) for argument in _home(hook).args)


def _composes(hook: ast.FunctionDef) -> str:
    return next(ast.literal_eval(word.value) for word in _home(hook).keywords if word.arg == "composes")


def _names(annotation: ast.expr | None) -> set[str]:
    return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} if annotation else set()


def _returns(hook: ast.FunctionDef, classes: dict[str, ast.ClassDef]) -> str:
    text = f"`{ast.unparse(hook.returns)}`".replace("|", "\\|") if hook.returns else ""
    links = [f"[{name}](#{name.lower()})" for name in sorted(_names(hook.returns) & classes.keys())]
    return " ".join(links) if hook.returns and ast.unparse(hook.returns) in classes else " ".join([text, *links])


def _signature(function: ast.FunctionDef) -> str:
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return f"{function.name}({ast.unparse(function.args)}){returns}"


def _doc(node: ast.FunctionDef | ast.ClassDef) -> str:
    return cleandoc(ast.get_docstring(node) or "").strip()


def _hook_section(hook: ast.FunctionDef, classes: dict[str, ast.ClassDef]) -> str:
    lines = [f"## {hook.name}\n", f"```python\n{_signature(hook)}\n```\n"]
    lines.append(f"Home: {_homes(hook)}. Composes: {_composes(hook)}. Returns: {_returns(hook, classes)}.\n")
    return "\n".join([*lines, _doc(hook) + "\n"])


def _protocol_section(protocol: ast.ClassDef) -> str:
    lines = [f"## {protocol.name}\n", _doc(protocol) + "\n"]
    for node in protocol.body:
        if isinstance(node, ast.AnnAssign):
            lines.append(f"- `{ast.unparse(node.target)}: {ast.unparse(node.annotation)}`")
        elif isinstance(node, ast.FunctionDef):
            doc = " ".join(_doc(node).split())
            lines.append(f"- `{_signature(node)}`" + (f"  \n  {doc}" if doc else ""))
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kernel_core.testing.hook_docs", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is stale")
    check, text = parser.parse_args().check, document()
    if check:
        return int(not TARGET.is_file() or TARGET.read_text() != text)
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
