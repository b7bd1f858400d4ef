"""The program `kernel`, run as a process of its own with distributions from a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import rich.console
import rich.table
import rich.text  # noqa: F401 - imported now: `shelf` hides site-packages later

from kernel_core import cli

COMMAND = """
    command = Command(name="hello", summary="say hello", arguments="shelf_hello:arguments", run="shelf_hello:run",
                      enables={enables})
    def arguments(parser): parser.add_argument("name")
    def run(arguments):
        from kernel_core.api import config_from_arguments
        config = config_from_arguments(arguments)
        print(arguments.name, config.model, config.device, config.engine.seed, config.plugins)
        {then}
"""


def add_hello(shelf, then="return 0", enables="()"):
    shelf.add("hello", COMMAND.format(then=then, enables=enables), kind="command", attribute="command", summary="say hello")


def test_help_lists_commands_from_metadata_and_imports_nothing_heavy(shelf):
    add_hello(shelf)
    shelf.add("gone", "raise RuntimeError('imported')", kind="command", attribute="command", summary="never imported")
    code = """
        import sys
        from kernel_core.cli import main
        code = main(["--help"])
        heavy = {"numpy", "pydantic", "torch", "rich", "pluggy", "shelf_hello", "shelf_gone"} & set(sys.modules)
        print("heavy:", sorted(heavy), "code:", code)
    """
    done = shelf.run(code=code)
    assert done.stdout.splitlines()[-1] == "heavy: [] code: 0", done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["hello", "say", "hello"] in lines and ["gone", "never", "imported"] in lines


def test_a_light_module_adds_little_to_the_start(shelf):
    """The figure is printed; nothing is asserted about time."""
    module = shelf.add("moon", "@hookimpl\ndef make_policy(context): ...")
    code = f"""
        import sys, time
        import kernel_core.api
        before = set(sys.modules)
        start = time.process_time()
        import {module}
        print(f"{{(time.process_time() - start) * 1000:.1f}} ms;", sorted(set(sys.modules) - before))
    """
    done = shelf.run(code=code)
    print("light module:", done.stdout)
    assert done.stdout.strip().endswith(f"['{module}']"), done.stderr


def test_a_command_gets_its_arguments_the_common_options_and_its_plugins(shelf):
    add_hello(shelf, enables='("moon",)')
    (shelf.folder / "kernel.toml").write_text('model = "a"\n[engine]\nseed = 1')
    done = shelf.run("hello", "Ada", "--device", "toy", "--set", "engine.seed=2", "--set", "plugins.sun.x=1")
    assert (done.stdout.strip(), done.returncode) == ("Ada a toy 2 {'sun': {'x': 1}, 'moon': {}}", 0), done.stderr


# The rest runs in this process: only the exit code and the two streams matter.


@pytest.mark.parametrize(
    ("then", "code", "message"),
    [
        ("return 3", 3, ""),
        ("return None", 0, ""),
        ("raise ConfigError('too dark')", 2, "kernel hello: too dark\n"),
        ("raise KeyboardInterrupt", 130, "\n"),
    ],
)
def test_exit_codes(shelf, capsys, then, code, message):
    add_hello(shelf, then=then)
    assert cli.main(["hello", "Ada"]) == code
    assert capsys.readouterr().err == message


def test_traceback_is_shown_on_demand(shelf):
    add_hello(shelf, then="raise ConfigError('too dark')")
    with pytest.raises(cli.ConfigError, match="too dark"):
        cli.main(["hello", "Ada", "--traceback"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("helo", "kernel helo: there is no such command; did you mean 'hello'?"),
        ("generate", "kernel generate: this command is not installed: pip install kernel-generate"),
    ],
)
def test_unknown_commands(shelf, capsys, name, message):
    add_hello(shelf)
    assert cli.main([name]) == 2
    assert message in capsys.readouterr().err


def test_a_broken_command_shows_its_traceback(shelf, capsys):
    shelf.add("hello", "1 / 0", kind="command", attribute="command")
    assert cli.main(["hello"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_something_else_than_a_command_is_refused(shelf, capsys):
    shelf.add("hello", "command = 3", kind="command", attribute="command")
    assert cli.main(["hello"]) == 2
    assert "is a int, not a Command" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kernel 0.")


# ---- kernel plugins


@pytest.fixture
def plugins(shelf, capsys, monkeypatch):
    """`kernel plugins ARGUMENTS` → (exit code, its output), with a few plugins on the shelf."""
    folder = Path(__file__).parents[3] / "plugins" / "plugins_command"
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])
    monkeypatch.setenv("COLUMNS", "160")
    shelf.write_metadata(
        "kernel-plugins-command",
        "1.0",
        "list plugins",
        "[kernel_core.commands]\nplugins = kernel_plugins_command:command\n",
    )
    shelf.device()
    shelf.add("moon", version="2.5")
    shelf.add("sun")
    shelf.add("broken", "import does_not_exist")
    shelf.add("family", FAMILY, kind="model", key="A", attribute="family")

    def run(*arguments):
        code = cli.main(
            ["plugins", "--set", 'profile="none"', "--set", "plugins.moon={}", "--set", "plugins.sun=false", *arguments]
        )
        captured = capsys.readouterr()
        return code, captured.out or captured.err

    return run


FAMILY = 'family = ModelFamily(name="f", build="x:y", weights="x:z")'


def test_the_table_names_every_plugin_and_says_in_one_line_what_is_broken(plugins):
    code, output = plugins("--set", "plugins.comet={}")
    assert code == 0
    rows = {line.split()[0]: line.split() for line in output.splitlines()[1:]}
    assert rows["moon"] == ["moon", "plugin", "2.5", "enabled", "the", "moon"]
    assert rows["sun"][3] == "off"
    assert rows["comet"] == ["comet", "plugin", "missing", "pip", "install", "kernel-comet"]
    assert rows["broken"][3:] == ["broken", "ModuleNotFoundError:", "No", "module", "named", "'does_not_exist'"]
    assert rows["toy"][1:4] == ["device", "1.0", "installed"]
    assert rows["A"][1:4] == ["model", "1.0", "installed"]
    assert rows["plugins"][3] == "default"


def test_the_table_as_json(plugins):
    rows = {row["name"]: row for row in json.loads(plugins("--json", "--device", "toy")[1])}
    assert (rows["toy"]["state"], rows["moon"]["distribution"], rows["broken"]["state"]) == ("enabled", "acme-moon", "broken")


def test_explain_prints_the_resolved_chain_with_reasons(plugins):
    code, output = plugins("--explain")
    assert code == 0
    assert "device toy: auto: first that can run here" in output
    assert "plugin moon: acme-moon 2.5, configuration" in output
    assert "order: moon" in output and "executor: in this process" in output
    document = json.loads(plugins("--explain", "--json")[1])
    assert document["plan"]["plugins"][0]["name"] == "moon" and len(document["hash"]) == 64


def test_explain_of_what_cannot_start_is_the_error(plugins):
    code, output = plugins("--explain", "--set", "plugins.comet={}")
    assert code == 2 and "the plugin 'comet' (configuration) is not installed" in output
    assert plugins("--explain", "ops")[0] == 2
