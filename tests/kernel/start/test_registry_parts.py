"""The plugins of one part: order, homes, contexts, services, request fields, model families, and the end."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any, Protocol

import pytest

from kernel_core.api import ModelInfo, Section
from kernel_core.errors import ConfigError, PluginError
from kernel_core.registry import HOOKS, Registry, find_family, mismatches
from kernel_core.resolver import resolve

INFO = ModelInfo("/nowhere", "none", {})


@pytest.fixture
def open_registry(shelf):
    """Resolve the named plugins and open one part of them; closed at the end."""
    shelf.device()
    opened = []

    def make(*names, part="engine", **config):
        settings = {"profile": "none", "device": "toy", "plugins": {name: {} for name in names}, **config}
        opened.append(Registry(resolve(settings), part, INFO))
        return opened[-1]

    yield make
    for registry in opened:
        registry.close()


# ---- calling hooks


def test_answers_come_in_resolved_order_each_plugin_with_its_own_context(shelf, open_registry):
    code = """
        class Own(Section):
            size: int = 1
        manifest = Manifest(name="{name}", summary="", section=Own, {more})
        @hookimpl
        def make_observer(context): return (context.plugin, context.part, context.section.size, context.config.model)
    """
    shelf.add("a", code.format(name="a", more='after=("b",)'))
    shelf.add("b", code.format(name="b", more=""))
    shelf.add("c", "@hookimpl\ndef make_observer(): return None")
    registry = open_registry(model="m", plugins={"a": {"size": 5}, "b": {}, "c": {}})
    assert registry.call("make_observer") == [("b", ("b", "engine", 1, "m")), ("a", ("a", "engine", 5, "m"))]
    assert registry.context("a") is registry.context("a")


def test_the_caller_may_give_contexts_and_arguments(shelf, open_registry):
    shelf.add("moon", "@hookimpl\ndef wrap_module(context, module, path): return (context, path, module)")
    registry = open_registry("moon", part="worker")
    answers = registry.call("wrap_module", lambda name: f"context of {name}", path="p", module="m")
    assert answers == [("moon", ("context of moon", "p", "m"))]


def test_a_chain_can_be_threaded(shelf, open_registry):
    for name in "ab":
        shelf.add(name, f"@hookimpl\ndef wrap_module(module): return module + '{name}'")
    module = ""
    for _, wrap in open_registry("a", "b", part="worker").hooks("wrap_module").items():
        module = wrap(context=None, path="", module=module)
    assert module == "ab"


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_a_hook_is_called_at_home_only(open_registry, hook):
    for part in ("face", "engine", "worker"):
        registry = open_registry(part=part)
        if part in HOOKS[hook].parts:
            assert isinstance(registry.hooks(hook), dict)
        else:
            with pytest.raises(PluginError, match=f"{hook} is at home in .*; it was called in the {part} part"):
                registry.hooks(hook)


def test_two_answers_in_an_exclusive_place_name_both(shelf, open_registry, monkeypatch):
    """The resolver refuses this before; the registry does not rely on it."""
    for name in "ab":
        shelf.add(name, "@hookimpl\ndef make_connector(context): return 1")
    monkeypatch.setattr("kernel_core.resolver._check_exclusive", lambda parts: None)
    with pytest.raises(ConfigError, match="only one plugin can be the connector, but 'a' and 'b'"):
        open_registry("a", "b").call("make_connector")


def test_a_failing_hook_names_plugin_hook_and_place(shelf, open_registry):
    shelf.add("moon", "@hookimpl\ndef make_observer(context):\n    return 1 / 0")
    with pytest.raises(PluginError, match=r"'moon' failed in make_observer: ZeroDivisionError: .*shelf_moon.py:\d+") as caught:
        open_registry("moon").call("make_observer")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_deliberate_errors_pass_unchanged(shelf, open_registry):
    shelf.add("moon", "@hookimpl\ndef make_observer(context): raise ConfigError('too dark')")
    with pytest.raises(ConfigError, match=r"^too dark$"):
        open_registry("moon").call("make_observer")


def test_only_the_chosen_executor_and_device_are_asked(shelf, open_registry):
    for name in ("one", "two"):
        shelf.add(name, f"@hookimpl\ndef make_executor(context, plan): return '{name} got ' + type(plan).__name__")
    shelf.device("other")
    registry = open_registry("one", "two", executor="two")
    assert registry.call("make_executor", plan=b"") == [("two", "two got bytes")]
    assert open_registry("one", "two", executor="in_process").call("make_executor", plan=b"") == []
    assert open_registry(part="worker").call("make_device", rank=0, world_size=1) == [("toy", "opened toy")]


def test_every_process_checks_that_it_runs_the_code_of_the_plan(shelf, open_registry):
    shelf.add("moon")
    plan = open_registry("moon").plan
    newer = replace(plan, plugins=(replace(plan.plugins[0], version="9.9"),))
    with pytest.raises(ConfigError, match=r"this process has acme-moon 1\.0, the plan was made with 9\.9"):
        Registry(newer, "worker", INFO)


# ---- the end

CLOSING = """
    class Made:
        def __init__(self, log): self.log = log
        def close(self):
            self.log.append("{name}")
            {then}
    log = []
    @hookimpl
    def make_observer(context): return Made(log)
    @hookimpl
    def make_resource(context): return [Made(log), Made(log)]
"""


def test_close_is_in_reverse_order_once_and_goes_on_after_a_failure(shelf, open_registry):
    shelf.add("a", CLOSING.format(name="a", then="pass"))
    shelf.add("b", CLOSING.format(name="b", then="raise OSError('stuck')").replace("log = []", "from shelf_a import log"))
    registry = open_registry("a", "b")
    registry.call("make_observer")
    registry.call("make_resource")
    log = sys.modules["shelf_a"].log
    with pytest.raises(PluginError, match=r"closing failed: b: OSError: stuck; b: .*; b: "):
        registry.close()
    assert log == ["b", "b", "a", "a", "b", "a"]
    registry.close()
    assert len(log) == 6


# ---- services

PROVIDER = """
    manifest = Manifest(name="sun", summary="", provides=("light/1",))
    class Light:
        def shine(self, watts, colour="white"): return watts
    built = []
    @hookimpl
    def make_service(context, name):
        built.append((context.plugin, name))
        return Light()
"""
USER = """
    from typing import Protocol
    manifest = Manifest(name="user", summary="", requires=("light/1",))
    class Lamp(Protocol):
        def {method}: ...
    @hookimpl
    def prepare_request(context): return context.service("{service}", Lamp).shine(3)
"""


def test_a_service_is_built_once_and_given_to_who_requires_it(shelf, open_registry):
    shelf.add("sun", PROVIDER)
    shelf.add("user", USER.format(method="shine(self, watts)", service="light/1"))
    registry = open_registry("sun", "user", part="face")
    assert registry.call("prepare_request") == [("user", 3)]
    assert registry.service("light/1") is registry.service("light/1")
    assert (registry.provider("light/1"), registry.provider("dark/1")) == ("sun", None)
    assert sys.modules["shelf_sun"].built == [("sun", "light/1")]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("shine(self, watts, angle)", "'shine' does not take the parameter angle"),
        ("glow(self)", "it has no 'glow'"),
        ("shine(self)", "'shine' demands the parameter watts"),
    ],
)
def test_a_provider_that_does_not_fit_names_both(shelf, open_registry, method, message):
    shelf.add("sun", PROVIDER)
    shelf.add("user", USER.format(method=method, service="light/1"))
    with pytest.raises(
        PluginError, match=rf"service 'light/1' of the plugin 'sun' does not fit what 'user' uses .*\(Lamp\): {message}"
    ):
        open_registry("sun", "user", part="face").call("prepare_request")


def test_a_service_must_be_declared_and_provided(shelf, open_registry):
    shelf.add("sun", PROVIDER)
    shelf.add("user", USER.format(method="shine(self, watts)", service="dark/1"))
    with pytest.raises(PluginError, match="'user' uses the service 'dark/1' and does not list it"):
        open_registry("sun", "user", part="face").call("prepare_request")
    with pytest.raises(ConfigError, match="'kernel' needs the service 'dark/1', which no enabled plugin provides"):
        open_registry("sun", part="face").service("dark/1")


def test_a_provider_that_builds_nothing_is_named(shelf, open_registry):
    shelf.add("sun", manifest='provides=("light/1",)')
    with pytest.raises(PluginError, match="'sun' says that it provides 'light/1', but its make_service built nothing"):
        open_registry("sun", part="face").service("light/1")


class Wanted(Protocol):
    width: int

    def act(self, one: int, *, two: int = 0) -> None: ...
    def _private(self) -> None: ...


@pytest.mark.parametrize(
    ("members", "wrong"),
    [
        ({"width": 1, "act": lambda one, two: 0}, []),
        ({"width": 1, "act": lambda **given: 0}, []),
        ({"width": 1, "act": lambda one, two, three=3, *rest: 0}, []),
        ({"act": lambda one, two: 0}, ["it has no 'width'"]),
        ({"width": 1, "act": 5}, ["'act' is not callable"]),
        ({"width": 1, "act": lambda one: 0}, ["'act' does not take the parameter two"]),
        ({"width": 1, "act": lambda: 0}, ["'act' does not take the parameters one, two"]),
        ({"width": 1, "act": lambda one, two, three: 0}, ["'act' demands the parameter three"]),
    ],
)
def test_what_a_protocol_asks(members, wrong):
    provider: Any = type("Provider", (), {})()
    vars(provider).update(members)
    assert mismatches(provider, Wanted) == wrong


# ---- request fields

FIELDS = """
    class Fields(Section):
        {name}: int = 0
    @hookimpl
    def register_fields(): return {{"{kind}": Fields}}
"""


def test_fields_are_merged_by_plugin(shelf, open_registry):
    shelf.add("a", FIELDS.format(name="bright", kind="request"))
    shelf.add("b", FIELDS.format(name="bright", kind="output"))
    fields = open_registry("a", "b", part="face").fields()
    assert list(fields) == ["a", "b"]
    assert (
        issubclass(fields["a"].request, Section) and "bright" in fields["a"].request.model_fields and fields["a"].output is None
    )
    assert fields["b"].request is None and "bright" in fields["b"].output.model_fields


@pytest.mark.parametrize(("name", "owners"), [("bright", "a and b"), ("temperature", "the kernel and [ab]")])
def test_a_field_of_two_owners_names_both(shelf, open_registry, name, owners):
    for plugin in "ab":
        shelf.add(plugin, FIELDS.format(name=name, kind="request"))
    with pytest.raises(ConfigError, match=f"request field '{name}' is registered by {owners}"):
        open_registry("a", "b", part="face").fields()


def test_fields_have_two_kinds(shelf, open_registry):
    shelf.add("a", FIELDS.format(name="bright", kind="reqest"))
    with pytest.raises(PluginError, match=r"'a' registers fields under \['reqest'\]"):
        open_registry("a", part="face").fields()


# ---- model families

FAMILY = 'family = ModelFamily(name="{name}", build="x:y", weights="x:z")'


def test_a_family_is_found_without_importing_the_others(shelf):
    shelf.add("moonlm", FAMILY.format(name="moonlm"), kind="model", key="MoonForCausalLM", attribute="family")
    shelf.add("sunlm", "raise RuntimeError('imported')", kind="model", key="SunForCausalLM", attribute="family")
    assert find_family("MoonForCausalLM").name == "moonlm"
    with pytest.raises(PluginError, match="RuntimeError: imported"):
        find_family("SunForCausalLM")
    with pytest.raises(ConfigError, match=r"'MonForCausalLM'; did you mean 'MoonForCausalLM'\?.*pip install kernel-"):
        find_family("MonForCausalLM")


def test_a_family_for_anything_takes_what_nobody_knows(shelf):
    shelf.add("anylm", FAMILY.format(name="anylm"), kind="model", key="*", attribute="family")
    shelf.add("moonlm", FAMILY.format(name="moonlm"), kind="model", key="MoonForCausalLM", attribute="family")
    assert [find_family(name).name for name in ("MoonForCausalLM", "X")] == ["moonlm", "anylm"]


def test_something_else_than_a_family_is_refused(shelf):
    shelf.add("moonlm", "family = 3", kind="model", key="M", attribute="family")
    with pytest.raises(PluginError, match="'shelf_moonlm:family' is a int, not a ModelFamily"):
        find_family("M")


# ---- the kernel stays as it was


def test_a_whole_life_changes_nothing_in_the_kernel(shelf, open_registry):
    """No name of a kernel module, and no attribute of its classes, is another object afterwards."""

    def snapshot():
        modules = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "kernel_core" and m is not None}
        state = {(n, k): id(v) for n, m in modules.items() for k, v in vars(m).items() if not k.startswith("__")}
        classes = {v for m in modules.values() for v in vars(m).values() if isinstance(v, type) and v.__module__ in modules}
        return state, {
            (c, k): id(v) for c in classes for k, v in vars(c).items() if not k.startswith("_abc") and k != "__abstractmethods__"
        }

    shelf.add("sun", PROVIDER)
    shelf.add("user", USER.format(method="shine(self, watts)", service="light/1"))
    before = snapshot()
    registry = open_registry("sun", "user", part="face")
    registry.call("prepare_request")
    registry.close()
    assert snapshot() == before


# ---- hooks of plugins

PAINTER = """
    import sys, types
    from kernel_core.api import home, hookspec
    hooks = types.ModuleType("painter_hooks")
    @hookspec
    @home("face", composes="{composes}")
    def choose_colour(context, surface): ...
    hooks.choose_colour = choose_colour
    @hookimpl
    def add_hookspecs(): return hooks
"""
CHOOSER = "@hookimpl(optionalhook=True)\ndef choose_colour(context, surface): return f'{context.plugin} for {surface}'"


def test_a_plugin_asks_a_hook_of_its_own(shelf, open_registry):
    shelf.add("painter", PAINTER.format(composes="all"))
    for name in ("red", "blue"):
        shelf.add(name, CHOOSER)
    registry = open_registry("painter", "red", "blue", part="face")
    answers = registry.context("painter").ask("choose_colour", surface="wall")
    assert answers == [("blue", "blue for wall"), ("red", "red for wall")]
    with pytest.raises(PluginError, match="'red' calls the hook 'choose_colour' and does not declare it"):
        registry.context("red").ask("choose_colour", surface="wall")


def test_such_a_hook_composes_as_declared(shelf, open_registry):
    shelf.add("painter", PAINTER.format(composes="exclusive"))
    for name in ("red", "blue"):
        shelf.add(name, CHOOSER)
    with pytest.raises(ConfigError, match=r"blue.*red"):
        open_registry("painter", "red", "blue", part="face").context("painter").ask("choose_colour", surface="wall")


def test_its_implementers_work_where_its_plugin_is_absent(shelf, open_registry):
    shelf.add("red", CHOOSER)
    assert open_registry("red", part="face").context("red").plugin == "red"
    shelf.add("green", CHOOSER.replace("(optionalhook=True)", ""))
    with pytest.raises(PluginError, match="'green' implements 'choose_colour', which is no hook"):
        open_registry("green", part="face")


def test_a_hook_has_one_declarer_and_its_signature_is_checked(shelf, open_registry):
    shelf.add("painter", PAINTER.format(composes="all"))
    shelf.add("artist", PAINTER.format(composes="all"))
    with pytest.raises(PluginError, match=r"'painter' declares the hook 'choose_colour', which artist declares"):
        open_registry("painter", "artist", part="face")
    shelf.add("odd", "@hookimpl(optionalhook=True)\ndef choose_colour(brush): return 1")
    with pytest.raises(PluginError, match="'odd' breaks a hook's specification"):
        open_registry("painter", "odd", part="face")


# ---- what several hooks share, and services that may be absent


def test_hooks_of_a_plugin_share_one_dict_in_a_part(shelf, open_registry):
    code = """
        @hookimpl
        def make_observer(context): context.shared["n"] = 1; return "o"
        @hookimpl
        def register_calls(context): return {"n": context.shared.get("n")}
    """
    shelf.add("a", code)
    shelf.add("b", code.replace('"n"] = 1', '"n"] = 2'))
    registry = open_registry("a", "b")
    registry.call("make_observer")
    assert registry.call("register_calls") == [("a", {"n": 1}), ("b", {"n": 2})]


def test_a_service_that_is_only_used_may_be_absent(shelf, open_registry):
    user = """
        manifest = Manifest(name="user", summary="", uses=("ink/1",))
        @hookimpl
        def make_observer(context): return [context.service("ink/1")]
    """
    shelf.add("user", user)
    assert open_registry("user").call("make_observer") == [("user", [None])]
    shelf.add("well", "@hookimpl\ndef make_service(name): return 'black'", manifest='provides=("ink/1",)')
    registry = open_registry("user", "well", part="face")
    assert registry.context("user").service("ink/1") == "black"
    assert [entry.name for entry in registry.plan.plugins] == ["well", "user"]
