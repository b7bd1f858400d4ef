"""Discovery reads metadata and imports nothing; loading says who failed and where."""

from __future__ import annotations

import sys

import pytest

from kernel_core.discovery import Found, Installed, did_you_mean, load, profile
from kernel_core.errors import ConfigError, PluginError


def test_finds_every_kind_without_importing(shelf):
    shelf.add("moon", "raise RuntimeError('imported')", version="2.1", summary="moonlight")
    shelf.add("toy", "raise RuntimeError('imported')", kind="device")
    shelf.add("family", "raise RuntimeError('imported')", kind="model", key="MoonForCausalLM", attribute="family")
    shelf.add("hello", "raise RuntimeError('imported')", kind="command", attribute="command")
    before = set(sys.modules)
    installed = Installed()
    assert [(f.kind, f.name, f.version) for f in installed.found] == [
        ("command", "hello", "1.0"),
        ("device", "toy", "1.0"),
        ("model", "MoonForCausalLM", "1.0"),
        ("plugin", "moon", "2.1"),
    ]
    assert installed.get("plugin", "moon") == Found("plugin", "moon", "shelf_moon", "acme-moon", "2.1", "moonlight")
    assert installed.get("plugin", "toy") is None
    assert {name for name in set(sys.modules) - before if name.startswith("shelf_")} == set()


def test_one_name_from_two_distributions_names_both(shelf):
    shelf.add("moon", dist="acme-moon")
    shelf.add("moon2", dist="other-moon", key="moon")
    installed = Installed()
    assert installed.names("plugin") == ["moon", "moon"]
    with pytest.raises(ConfigError, match=r"acme-moon 1.0 and other-moon 1.0: uninstall"):
        installed.get("plugin", "moon")


@pytest.mark.parametrize("failure", ["import does_not_exist", "1 / 0", "raise SystemExit(3)", "def broken(:"])
def test_a_module_that_fails_to_load_is_named_with_its_traceback(shelf, failure):
    shelf.add("moon", failure)
    with pytest.raises(PluginError) as caught:
        load(Installed().get("plugin", "moon"))
    message = str(caught.value)
    assert message.startswith("the plugin 'moon' (acme-moon 1.0) failed to load from 'shelf_moon':")
    assert "shelf_moon.py" in message and "Traceback" in message and type(caught.value.__cause__).__name__ in message


def test_missing_attribute_is_named(shelf):
    shelf.add("hello", "x = 1", kind="command", attribute="command")
    with pytest.raises(PluginError, match="has no attribute 'command'"):
        load(Installed().get("command", "hello"))


@pytest.mark.parametrize(("name", "said"), [("prioity", "; did you mean 'priority'?"), ("xyz", "")])
def test_nearest_name(name, said):
    assert did_you_mean(name, ["text", "priority"]) == said


def test_profiles():
    assert profile("none") == {}
    assert profile("default")["text"] == "text"
    with pytest.raises(ConfigError, match=r"profile = 'defualt'.*did you mean 'default'"):
        profile("defualt")
