"""Real distributions in a temporary folder: a module and a dist-info with METADATA and entry_points.txt each."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import packaging.specifiers  # noqa: F401 - imported now: `shelf` hides site-packages later
import pytest

import kernel_core.api
import kernel_core.registry
import kernel_core.resolver  # noqa: F401
from kernel_core.discovery import GROUPS

PREFIX = "shelf_"


class Shelf:
    """The only distributions that exist, besides kernel-core."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write_metadata("kernel-core", metadata.version("kernel-core"), "the kernel", "")

    def add(self, name, code="", *, kind="plugin", dist=None, version="1.0", summary=None, manifest="", attribute="", key=None):
        """A distribution with one entry point `key` (default: `name`) and one module. `manifest`: further arguments of it."""
        module = f"{PREFIX}{name}"
        head = """
            from typing import Any
            from kernel_core.api import Command, ConfigError, Constraint, Manifest, ModelFamily, RequestError, Section, hookimpl
        """
        own = f'manifest = Manifest(name="{key or name}", summary="the {name}"{", " + manifest if manifest else ""})\n'
        body = textwrap.dedent(code)
        text = textwrap.dedent(head) + (body if "manifest =" in body or attribute else body + "\n" + own)
        (self.folder / f"{module}.py").write_text(text)
        point = f"[{GROUPS[kind]}]\n{key or name} = {module}{attribute and ':' + attribute}\n"
        self.write_metadata(dist or f"acme-{name.replace('_', '-')}", version, summary or f"acme {name}", point)
        return module

    def device(self, name="toy", refuses=None, manifest=""):
        code = f"""
            @hookimpl
            def probe_device(section): return {refuses!r}
            @hookimpl
            def make_device(context, rank, world_size): return "opened {name}"
        """
        return self.add(name, code, kind="device", manifest=manifest)

    def write_metadata(self, dist, version, summary, points):
        info = self.folder / f"{dist.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: {version}\nSummary: {summary}\n")
        (info / "entry_points.txt").write_text(points)

    def run(self, *arguments, code=None):
        """`kernel ARGUMENTS`, or code, in a fresh interpreter that sees this shelf first."""
        command = ["-c", textwrap.dedent(code)] if code else ["-m", "kernel_core"]
        paths = os.pathsep.join([str(self.folder), str(Path(__file__).parents[3])])
        environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, *command, *arguments], env=environment, cwd=self.folder, capture_output=True, text=True, check=False
        )


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty shelf; the distributions that are really installed are hidden, modules of the shelf forgotten afterwards."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    made = Shelf(folder)
    monkeypatch.setattr(sys, "path", [str(folder), *(p for p in sys.path if "site-packages" not in p)])
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield made
    for name in [name for name in sys.modules if name.startswith(PREFIX)]:
        del sys.modules[name]
    importlib.invalidate_caches()
