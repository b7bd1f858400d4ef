"""Prints the contracts of import-linter for the distributions that exist now; `make lint` runs them."""

from __future__ import annotations

import json

import source_tree as source

# The kernel reaches its torch side in one place, when an engine starts.
LAZY_IMPORTS = ("kernel_core.executor -> kernel_core.nn.worker",)


def _listing(values: list[str]) -> str:
    return json.dumps(values, indent=4)


def _contract(name: str, kind: str, **settings: list[str]) -> str:
    lines = ["[[tool.importlinter.contracts]]", f"name = {json.dumps(name)}", f'type = "{kind}"']
    lines += [f"{key} = {_listing(value)}" for key, value in settings.items()]
    return "\n".join(lines)


def kernel_modules() -> list[str]:
    """The kernel without its torch side, one name a file or folder."""
    children = [p for p in sorted(source.KERNEL.iterdir()) if p.suffix == ".py" or (p / "__init__.py").exists()]
    return [f"kernel_core.{p.stem}" for p in children if p.stem not in ("nn", "__init__")]


def existing_lazy_imports() -> list[str]:
    """Those of LAZY_IMPORTS that the code has; import-linter refuses the others."""
    return [edge for edge in LAZY_IMPORTS if _has(*edge.split(" -> "))]


def _has(importer: str, imported: str) -> bool:
    file = source.ROOT / (importer.replace(".", "/") + ".py")
    return file.exists() and any(name.startswith(imported) for name, _ in source.imports(file))


def contracts() -> list[str]:
    plugins = [distribution.package for distribution in source.distributions()]
    found = [
        _contract(
            "the kernel's torch-free side imports neither torch nor kernel_core.nn",
            "forbidden",
            source_modules=kernel_modules(),
            forbidden_modules=["torch", "transformers", "kernel_core.nn"],
            ignore_imports=existing_lazy_imports(),
        )
    ]
    if plugins:
        kernel = _contract("the kernel imports no plugin", "forbidden", source_modules=["kernel_core"], forbidden_modules=plugins)
        found.append(kernel)
    if len(plugins) > 1:
        found.append(_contract("no plugin imports another plugin", "independence", modules=plugins))
    return found


def configuration() -> str:
    packages = ["kernel_core", *(distribution.package for distribution in source.distributions())]
    head = ["[tool.importlinter]", f"root_packages = {_listing(packages)}", "include_external_packages = true"]
    return "\n\n".join(["\n".join([*head, "exclude_type_checking_imports = true"]), *contracts()])


if __name__ == "__main__":
    print(configuration())
