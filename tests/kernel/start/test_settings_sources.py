"""kernel.toml, --set and keywords give one configuration; errors name the source, the key and the nearest valid key."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_core.config import KernelConfig
from kernel_core.errors import ConfigError
from kernel_core.settings import add_arguments, as_data, config_from_arguments, config_from_keywords, merge, parse_setting


def from_line(*arguments, enable=()):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    namespace = parser.parse_args(arguments)
    namespace.enable = enable
    return config_from_arguments(namespace)


@pytest.fixture
def toml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda text, name="kernel.toml": (tmp_path / name).write_text(text)


def test_without_any_source_defaults_hold(toml):
    assert from_line() == KernelConfig() == config_from_keywords()


def test_later_sources_win_key_by_key(toml):
    toml('model = "a"\ndevice = "d"\n[engine]\nmax_requests = 1\nseed = 1\n[plugins.moon]\nphase = 1\nlight = 2')
    config = from_line("--model", "b", "--set", "engine.max_requests=2", "--set", "plugins.moon.phase=3")
    assert (config.model, config.device, config.engine.max_requests, config.engine.seed) == ("b", "d", 2, 1)
    assert config.plugins == {"moon": {"phase": 3, "light": 2}}


def test_a_named_file_is_read_instead_of_the_one_that_lies_there(toml):
    toml('model = "a"')
    toml('model = "c"', "other.toml")
    assert from_line("--config", "other.toml").model == "c"
    with pytest.raises(ConfigError, match=r"no configuration file 'gone\.toml'"):
        from_line("--config", "gone.toml")


def test_python_reads_a_file_only_when_it_is_named(toml):
    toml('model = "a"')
    assert config_from_keywords().model == "tiny-chat"
    assert config_from_keywords("kernel.toml", max_requests=3).model == "a"


def test_keywords_may_name_engine_keys_flat_and_go_over_the_configuration():
    base = KernelConfig.model_validate({"model": "a", "engine": {"seed": 5, "max_requests": 7}})
    config = config_from_keywords(base, max_requests=3, engine={"seed": 6}, plugins={"moon": {}})
    assert (config.model, config.engine.max_requests, config.engine.seed, config.plugins) == ("a", 3, 6, {"moon": {}})
    assert "dtype" not in as_data(config)["engine"]


def test_a_plugin_is_switched_off_and_on_again():
    assert merge({"plugins": {"moon": {"x": 1}}}, {"plugins": {"moon": False}}) == {"plugins": {"moon": False}}
    assert merge({"plugins": {"moon": True}}, {"plugins": {"moon": {"x": 1}}}) == {"plugins": {"moon": {"x": 1}}}
    assert merge({"plugins": {"moon": {"x": 1}}}, {"plugins": {"moon": True}}) == {"plugins": {"moon": {"x": 1}}}


def test_a_command_enables_its_plugins_but_keeps_their_sections(toml):
    config = from_line("--set", "plugins.moon.x=1", "--set", "plugins.sun=false", enable=("moon", "sun", "star"))
    assert config.plugins == {"moon": {"x": 1}, "sun": False, "star": {}}


@pytest.mark.parametrize(
    ("text", "value"),
    [("a.b=1", {"a": {"b": 1}}), ("a=x y", {"a": "x y"}), ("a='1'", {"a": "1"}), ("a=[1, 2]", {"a": [1, 2]}),
     ("a=2GiB", {"a": "2GiB"}), ("a=http://b=c", {"a": "http://b=c"}), ("a = true", {"a": True}), ("a=1e-3", {"a": 1e-3})],
)  # fmt: skip
def test_setting_is_toml_or_a_bare_word(text, value):
    assert parse_setting(text) == value


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), st.integers(-99, 99), min_size=1), st.booleans())
def test_setting_takes_any_inline_table(table, flag):
    items = ", ".join(f"{key} = {value}" for key, value in table.items())
    assert parse_setting(f"plugins.x={{{items}}}") == {"plugins": {"x": table}}
    assert parse_setting(f"x={str(flag).lower()}") == {"x": flag}


@pytest.mark.parametrize("text", ["engine.seed", "=3", "a..b=1", "a=[1,", 'a="x', "a="])
def test_malformed_setting_is_refused(text):
    with pytest.raises(ConfigError, match="--set"):
        parse_setting(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": {"max_reqests": 1}}, "[engine] max_reqests: unknown key; did you mean 'max_requests'?"),
        ({"modle": "x"}, "modle: unknown key; did you mean 'model'?"),
        ({"max_requests": 1}, "max_requests: unknown key; it belongs to the table [engine]: engine.max_requests"),
        ({"max_reqests": 1}, "max_reqests: unknown key; did you mean 'engine.max_requests'?"),
        ({"engine": {"model": "x"}}, "[engine] model: unknown key; it belongs to the top level"),
        ({"engine": {"max_requests": 0}}, "[engine] max_requests: input should be greater than or equal to 1, got 0"),
        ({"plugins": {"moon": 3}}, "[plugins.moon]: "),
        ({"engine": 3}, "engine: "),
    ],
)
def test_errors_name_the_key_and_where_it_could_live(values, message):
    with pytest.raises(ConfigError) as caught:
        config_from_keywords(values)
    assert f"config: {message}" in str(caught.value)


def test_errors_come_all_at_once_each_with_its_source(toml):
    toml("[engine]\nmax_reqests = 1")
    with pytest.raises(ConfigError) as caught:
        from_line("--set", "engine.dtpe=float32", "--set", "engine.overlap=perhaps")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("--set engine.overlap=perhaps: [engine] overlap: ")
    assert "kernel.toml: [engine] max_reqests: unknown key; did you mean 'max_requests'?" in lines
    assert "--set engine.dtpe=float32: [engine] dtpe: unknown key; did you mean 'dtype'?" in lines


def test_keyword_that_is_a_plugin_says_where_its_section_is(shelf):
    shelf.add("moon")
    with pytest.raises(ConfigError, match=r"keyword arguments: moon: unknown key; .* \[plugins.moon\]"):
        config_from_keywords(moon={})


def test_broken_file_is_named(toml):
    toml("model = \ndevice = 1")
    with pytest.raises(ConfigError, match=r"kernel.toml is not valid TOML: .*line 1"):
        from_line()


def test_values_that_cannot_travel_are_refused():
    with pytest.raises(ConfigError, match="must be made of numbers, strings"):
        as_data(KernelConfig.model_validate({"plugins": {"moon": {"f": object()}}}))
