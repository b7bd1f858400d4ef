"""The third-party examples, as a user would have them: pip into a fresh environment, named in kernel.toml, seen to work.

The fresh environment sees this one's packages (torch is large) through a .pth file; what is installed goes into its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from pathlib import Path

import pytest
import source_tree as source

EXAMPLES = source.ROOT / "examples"


class Environment:
    """A fresh virtual environment and a folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.work.mkdir()
        venv.create(folder / "venv", with_pip=False)
        self.python = folder / "venv" / "bin" / "python"
        site = next((folder / "venv").glob("lib/python*/site-packages"))
        outer = sysconfig.get_path("purelib")
        (site / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")

    def run(self, *arguments: str) -> str:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = [str(self.python), *arguments]
        done = subprocess.run(command, cwd=self.work, env=variables, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def install(self, example: Path) -> None:
        """pip, from a copy of the folder alone; nothing is fetched: what it requires must be there already."""
        copy = self.work / example.name
        shutil.copytree(example, copy, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
        self.run("-m", "pip", "install", "-q", "--no-index", "--no-build-isolation", str(copy))
        shutil.copy(copy / "kernel.toml", self.work / "kernel.toml")
        shutil.rmtree(copy)

    def script(self, code: str, *arguments: str) -> dict:
        """Run code that prints one JSON object last."""
        return json.loads(self.run("-c", textwrap.dedent(code), *arguments).splitlines()[-1])


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def test_plugin_works_where_it_is_named(environment: Environment, byte_model: Path) -> None:
    environment.install(EXAMPLES / "third_party_plugin")
    report = environment.script(
        """
        import json, sys
        import no_repeat
        from kernel_core import LLM
        from kernel_core.api import SamplingParams

        def tokens(output):
            return list(output.prompt_token_ids) + list(output.outputs[0].token_ids)

        prompts = ["What does os.path.join do? do? do?", "Hello! Hello!"]
        common = dict(seed=1, allowed_token_ids=list(range(100, 180)), max_tokens=40, ignore_eos=True)
        plain, banned = SamplingParams.of(**common), SamplingParams.of(**common, no_repeat=64)
        with LLM(config="kernel.toml", model=sys.argv[1]) as llm:
            outputs = llm.generate(prompts * 2, [plain, plain, banned, banned])
        with LLM(model=sys.argv[1]) as llm:
            without = llm.generate(prompts, plain)
            try:
                refused = llm.generate(prompts, banned) and "accepted"
            except ValueError as error:
                refused = str(error)
        lengths = [len(output.prompt_token_ids) for output in outputs]
        report = {"file": no_repeat.__file__, "prompts": lengths, "refused": refused}
        print(json.dumps(report | {"with": [*map(tokens, outputs)], "without": [*map(tokens, without)]}))
        """,
        str(byte_model),
    )
    plain, banned = report["with"][:2], report["with"][2:]
    assert str(environment.python.parent.parent) in report["file"]
    assert plain == report["without"], "a request that does not ask is unchanged, also beside those that do"
    for prompt, before, after in zip(report["prompts"], plain, banned):
        assert after != before
        assert any(before[place] in before[max(place - 64, 0) : place] for place in range(prompt, len(before))), "the ban bites"
        assert not any(after[place] in after[max(place - 64, 0) : place] for place in range(prompt, len(after)))
    assert "no_repeat" in report["refused"], "installed is not enabled: the field is refused by name"


def test_device_gives_what_the_cpu_gives(environment: Environment, byte_model: Path) -> None:
    environment.install(EXAMPLES / "third_party_device")
    report = environment.script(
        """
        import json, sys
        import kernel_core.nn.runner, kernel_core.nn.worker, kernel_core.nn.ops
        from kernel_core import LLM

        prompts = ["What does os.path.join do?", "Call math.sqrt with 16", "Hello!", "What does textwrap.dedent do?"] * 2
        engines = {"plain": {}, "chunked": {"max_tokens_per_step": 7}, "short": {"kv_blocks": 14, "max_model_len": 64}}
        modules = [module for name, module in sys.modules.items() if name.startswith("kernel_core")]
        before = [dict(vars(module)) for module in modules]
        report = {}
        for name, engine in {**engines, "cpu": {"device": "cpu"}}.items():
            with LLM(config="kernel.toml", model=sys.argv[1], dtype="float32", **engine) as llm:
                greedy = llm.generate(prompts, temperature=0, max_tokens=24, ignore_eos=True)
                drawn = llm.generate(prompts, temperature=1, seed=7, max_tokens=24, ignore_eos=True)
                tokens = [list(output.outputs[0].token_ids) for output in greedy + drawn]
                core = llm.engine.core
                report[name] = {"tokens": tokens, "summary": llm.engine.summary, "preemptions": core.scheduler.preemptions}
                report[name]["block_size"] = core.report.groups[0].block_size
        report["patched"] = [
            f"{module.__name__}.{key}"
            for module, state in zip(modules, before)
            for key, value in state.items()
            if vars(module).get(key) is not value
        ]
        print(json.dumps(report))
        """,
        str(byte_model),
    )
    assert report["patched"] == []
    for name in ("plain", "chunked", "short"):
        assert "on toy" in report[name]["summary"]
        assert report[name]["tokens"] == report["cpu"]["tokens"], name
    assert "on cpu" in report["cpu"]["summary"]
    assert report["short"]["preemptions"] > 0
    assert report["plain"]["block_size"] == 8, "the kernel keeps to the device's own block size"


@pytest.mark.parametrize(("example", "limit"), [("third_party_plugin", 60), ("third_party_device", 200)])
def test_example_is_small(example: str, limit: int) -> None:
    lines = sum(source.code_lines(file) for file in (EXAMPLES / example).rglob("*.py"))
    print(f"{example}: {lines} code lines (limit {limit})")
    assert 0 < lines <= limit
