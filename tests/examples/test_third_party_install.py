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

    def script(self, code: str) -> dict:
        """Run code that prints one JSON object last."""
        return json.loads(self.run("-c", textwrap.dedent(code)).splitlines()[-1])


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


def code_lines(example: Path) -> int:
    return sum(source.code_lines(file) for file in example.rglob("*.py"))


def test_plugin_works_where_it_is_named(environment: Environment) -> None:
    environment.install(EXAMPLES / "third_party_plugin")
    report = environment.script(
        """
        import json
        import no_repeat
        from kernel_core import LLM
        from kernel_core.api import SamplingParams

        prompts = ["What does os.path.join do?", "Hello!"] * 2
        greedy = dict(temperature=0, max_tokens=24, ignore_eos=True)
        plain, banned = SamplingParams.of(**greedy), SamplingParams.of(**greedy, no_repeat=64)
        with LLM(config="kernel.toml") as llm:
            outputs = llm.generate(prompts, [plain, plain, banned, banned])
        with LLM(model="tiny-chat") as llm:
            without = llm.generate(prompts[:2], [plain, plain])
            try:
                llm.generate(prompts[:1], [banned])
                refused = ""
            except ValueError as error:
                refused = str(error)
        texts = [list(o.prompt_token_ids) + list(o.outputs[0].token_ids) for o in outputs]
        print(json.dumps({
            "file": no_repeat.__file__, "prompt": [len(o.prompt_token_ids) for o in outputs], "texts": texts,
            "without": [list(o.prompt_token_ids) + list(o.outputs[0].token_ids) for o in without], "refused": refused,
        }))
        """
    )
    assert str(environment.python.parent.parent) in report["file"]
    assert report["texts"][:2] == report["without"], "requests that do not ask are unchanged, beside some that do"
    for prompt, plain, banned in zip(report["prompt"], report["texts"][:2], report["texts"][2:]):
        assert banned != plain
        for place in range(prompt, len(banned)):
            assert banned[place] not in banned[max(place - 64, 0) : place]
    assert any(tokens[i] in tokens[:i] for tokens in report["texts"][:2] for i in range(len(tokens))), "the ban bites"
    assert "no_repeat" in report["refused"], "installed is not enabled: the field is refused by name"


def test_device_gives_what_the_cpu_gives(environment: Environment) -> None:
    environment.install(EXAMPLES / "third_party_device")
    report = environment.script(
        """
        import json, sys
        import kernel_core.nn.runner, kernel_core.nn.worker, kernel_core.scheduler
        from kernel_core import LLM

        prompts = ["What does os.path.join do?", "Call math.sqrt with 16", "Hello!", "What does textwrap.dedent do?"]
        sizes = {"plain": {}, "chunked": {"max_tokens_per_step": 7}, "preempted": {"kv_blocks": 14, "max_model_len": 96}}
        watched = [m for n, m in sys.modules.items() if n.startswith("kernel_core")]
        before = [dict(vars(m)) for m in watched]
        report = {}
        for device in ("toy", "cpu"):
            for name, engine in sizes.items():
                own = {"config": "kernel.toml"} if device == "toy" else {"model": "tiny-chat", "device": "cpu"}
                with LLM(**own, dtype="float32", **engine) as llm:
                    greedy = llm.generate(prompts, temperature=0, max_tokens=24, ignore_eos=True)
                    drawn = llm.generate(prompts, temperature=1, seed=7, max_tokens=24, ignore_eos=True)
                    report[f"{device} {name}"] = [list(o.outputs[0].token_ids) for o in greedy + drawn]
                    report[f"{device} {name} summary"] = llm.engine.summary
        report["patched"] = [
            f"{module.__name__}.{key}" for module, state in zip(watched, before)
            for key, value in state.items() if vars(module).get(key) is not value
        ]
        print(json.dumps(report))
        """
    )
    assert report["patched"] == []
    assert "toy" in report["toy plain summary"]
    for name in ("plain", "chunked", "preempted"):
        assert report[f"toy {name}"] == report["cpu plain"], name


@pytest.mark.parametrize(("example", "limit"), [("third_party_plugin", 60), ("third_party_device", 200)])
def test_example_is_small(example: str, limit: int) -> None:
    lines = code_lines(EXAMPLES / example)
    print(f"{example}: {lines} code lines (limit {limit})")
    assert 0 < lines <= limit
