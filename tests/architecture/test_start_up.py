"""What importing costs and changes. Each check runs in a fresh interpreter."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import textwrap

import pytest
import source_tree as source

LIGHT = sorted({module for distribution in source.distributions() for module in distribution.entry_modules})
FOLDERS = [str(source.ROOT), *(str(distribution.folder) for distribution in source.distributions())]


def python(code: str, *arguments: str, folders: list[str] = FOLDERS) -> str:
    """Run code in a fresh interpreter that sees this source tree; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_light_modules_import_nothing_heavy() -> None:
    loaded = python(
        """
        import importlib, sys
        for name in sys.argv[1:]:
            importlib.import_module(name)
        print(*(name for name in ("torch", "transformers", "kernel_core.nn") if name in sys.modules))
        """,
        "kernel_core",
        "kernel_core.api",
        *LIGHT,
    )
    assert loaded.split() == []


@pytest.fixture(scope="module")
def import_seconds() -> dict[str, float]:
    """Processor time of importing each light module after the API; the better of two runs."""
    code = """
        import importlib, sys, time
        import kernel_core.api
        for name in sys.argv[1:]:
            begin = time.process_time()
            importlib.import_module(name)
            print(time.process_time() - begin)
        """
    runs = [[float(seconds) for seconds in python(code, *LIGHT).split()] for _ in range(2)]
    return {name: min(times) for name, times in zip(LIGHT, zip(*runs))}


@pytest.mark.parametrize("module", LIGHT)
def test_light_module_imports_within_fifty_milliseconds(module: str, import_seconds: dict[str, float]) -> None:
    """Of processor time, so that a busy machine does not matter."""
    print(f"import {module}: {import_seconds[module] * 1000:.1f} ms")
    assert import_seconds[module] <= 0.05


@pytest.mark.parametrize("modules", [LIGHT, [*LIGHT, "heavy"]], ids=["light", "all"])
def test_importing_plugins_changes_nothing_in_the_kernel(modules: list[str]) -> None:
    """No patches: every name of every kernel module, and every attribute of its classes, is the same object as before."""
    packages = [d.package for d in source.distributions()] if "heavy" in modules else []
    changed = python(
        """
        import importlib, inspect, pkgutil, sys
        light, packages = sys.argv[1].split(), sys.argv[2].split()
        import kernel_core
        for found in pkgutil.walk_packages(kernel_core.__path__, "kernel_core."):
            if found.name.endswith("__main__") or (not packages and found.name.startswith("kernel_core.nn")):
                continue
            importlib.import_module(found.name)

        def attributes():
            state = {}
            for name, module in list(sys.modules.items()):
                if name.split(".")[0] != "kernel_core":
                    continue
                for key, value in vars(module).items():
                    if inspect.ismodule(value) or (key.startswith("__") and key.endswith("__")):
                        continue
                    state[name, key] = value
                    if inspect.isclass(value) and value.__module__.startswith("kernel_core"):
                        ignored = ("__abstractmethods__", "_abc_impl", "__non_callable_proto_members__")
                        state.update({(name, key, k): v for k, v in vars(value).items() if k not in ignored})
            return state

        before = attributes()
        for name in light:
            importlib.import_module(name)
        for package in packages:
            for found in pkgutil.walk_packages(importlib.import_module(package).__path__, package + "."):
                if "train" not in found.name and not found.name.endswith("__main__"):
                    importlib.import_module(found.name)
        after = attributes()
        print(*(".".join(key) for key in after if key not in before or after[key] is not before[key]))
        """,
        " ".join(LIGHT),
        " ".join(packages),
    )
    assert changed.split() == []


def test_kernel_imports_with_an_accelerator_library_that_raises() -> None:
    """Any use of torch.cuda by the kernel, even a look at it, fails; torch's own use goes through."""
    folders = [str(source.ROOT / "tests" / "architecture"), *FOLDERS]
    python(
        """
        import poisoned_cuda, importlib, pkgutil, kernel_core
        for found in pkgutil.walk_packages(kernel_core.__path__, "kernel_core."):
            if not found.name.endswith("__main__"):
                importlib.import_module(found.name)
        """,
        folders=folders,
    )


@pytest.mark.slow
def test_kernel_tests_pass_with_an_accelerator_library_that_raises() -> None:
    """The kernel's tests, with any use of torch.cuda by the kernel or a plugin made to raise."""
    folders = [str(source.ROOT / "tests" / "architecture"), *FOLDERS]
    arguments = ["-m", "pytest", "-q", "-m", "not slow", "-p", "poisoned_cuda", "tests/kernel"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=source.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    print(done.stdout[-2000:])
    assert done.returncode == 0


def test_help_is_quick() -> None:
    """`kernel --help` takes at most half a second of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    text = python("import sys; from kernel_core.cli import main; sys.argv = ['kernel', '--help']; main()")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"kernel --help: {seconds:.2f} s")
    assert "usage" in text.lower()
    assert seconds <= 0.5
