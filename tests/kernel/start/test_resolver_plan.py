"""From a configuration and what is installed to one frozen plan, or to an error that names everybody concerned."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_core.api import Constraint, KernelConfig, Manifest, Section, hookimpl
from kernel_core.discovery import Found
from kernel_core.enabling import Configured
from kernel_core.errors import ConfigError, PluginError
from kernel_core.resolver import ResolvedPlan, resolve, settle

NONE = {"profile": "none", "device": "toy"}


def plan_of(*names, **config):
    return resolve({**NONE, "plugins": {name: {} for name in names}, **config})


def names(plan):
    return [entry.name for entry in plan.plugins]


@pytest.fixture
def toys(shelf):
    """A shelf that has a device."""
    shelf.device()
    return shelf


# ---- who takes part


def test_installed_is_not_enabled(toys):
    toys.add("moon")
    toys.add("broken", "raise RuntimeError('boom')")
    plan = plan_of()
    assert (names(plan), plan.device.name, plan.executor) == ([], "toy", None)
    assert not {"shelf_moon", "shelf_broken"} & set(sys.modules)


def test_named_plugin_that_fails_to_load_stops_the_start_with_its_traceback(toys):
    toys.add("broken", "raise RuntimeError('boom')")
    with pytest.raises(PluginError, match=r"(?s)'broken' \(acme-broken 1.0\).*shelf_broken.py.*RuntimeError: boom"):
        plan_of("broken")


def test_unknown_plugin_says_the_nearest_name_and_how_to_install(toys):
    toys.add("prefix_hits")
    with pytest.raises(ConfigError, match=r"did you mean 'prefix_hits'\? To install it: pip install kernel-prefix-hit$"):
        plan_of("prefix_hit")
    with pytest.raises(ConfigError, match=r"plugins.prefix_hit = false: .* did you mean 'prefix_hits'"):
        resolve({**NONE, "plugins": {"prefix_hit": False}})


def test_profile_enables_its_plugins_and_false_leaves_one_out(toys):
    for name in ("text", "penalties", "logit_rules", "safetensors", "prefix_caching"):
        toys.add(name)
    assert names(resolve({"device": "toy"})) == ["logit_rules", "penalties", "prefix_caching", "safetensors", "text"]
    plan = resolve({"device": "toy", "plugins": {"penalties": False}})
    assert names(plan) == ["logit_rules", "prefix_caching", "safetensors", "text"]
    assert plan.plugins[0].reason == "profile default (sampling)"
    again = resolve(plan.config)
    assert (again.config, names(again)) == (plan.config, names(plan))


def test_missing_plugin_of_the_profile_stops_the_start_unless_left_out(toys):
    for name in ("penalties", "logit_rules", "safetensors", "prefix_caching"):
        toys.add(name)
    with pytest.raises(ConfigError, match=r"'text' of the profile default.*kernel-text, or set `plugins.text = false`"):
        resolve({"device": "toy"})
    assert "text" not in names(resolve({"device": "toy", "plugins": {"text": False}}))


def test_a_command_enables_plugins(toys):
    toys.add("moon")
    assert resolve(NONE, enable=["moon"]).plugins[0].reason == "the command enables it"
    with pytest.raises(ConfigError, match=r"plugins.moon = false, but the command enables it"):
        resolve({**NONE, "plugins": {"moon": False}}, enable=["moon"])


# ---- what a plugin must be


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("manifest = None", "no `manifest = Manifest"),
        ('manifest = Manifest(name="sun", summary="")', "named 'sun'"),
        ('manifest = Manifest(name="moon", summary="", api=">=0.2")', r"for the API >=0.2, this kernel has 0\.1"),
        ('manifest = Manifest(name="moon", summary="", api="new")', "not a version range"),
        ("@hookimpl\ndef make_polcy(context): ...", "'make_polcy', which is no hook; did you mean 'make_policy'"),
        ("@hookimpl(tryfirst=True)\ndef make_policy(context): ...", "'moon' marks make_policy as tryfirst"),
        ("@hookimpl(trylast=True)\ndef make_policy(context): ...", "'moon' marks make_policy as trylast"),
        ("@hookimpl(wrapper=True)\ndef make_policy(context): yield", "'moon' marks make_policy as wrapper"),
        ("@hookimpl(hookwrapper=True)\ndef make_policy(context): yield", "'moon' marks make_policy as hookwrapper"),
        ("@hookimpl\ndef make_policy(engine): ...", r"(?s)'moon' breaks a hook's specification.*make_policy.*engine"),
        ("@hookimpl\ndef make_device(context): ...", "make_device: its entry point belongs to the group kernel_core.devices"),
    ],
)
def test_a_plugin_that_breaks_the_contract_is_refused_by_name(toys, code, message):
    toys.add("moon", code)
    with pytest.raises(PluginError, match=message) as caught:
        plan_of("moon")
    assert "moon" in str(caught.value)


SECTION = """
    class Moon(Section):
        phase: int = 1
        names: list[int] = []
    manifest = Manifest(name="moon", summary="", section=Moon)
"""


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"fase": 2}, r"^\[plugins.moon\] fase: unknown key; did you mean 'phase'\?"),
        ({"zzz": 2}, r"^\[plugins.moon\] zzz: unknown key \(it has phase, names\)"),
        ({"phase": "full"}, r"^\[plugins.moon\] phase: input should be a valid integer.*got 'full'"),
        ({"names": [1, "x"]}, r"^\[plugins.moon\] names: "),
    ],
)
def test_section_errors_name_plugin_and_key(toys, section, message):
    toys.add("moon", SECTION)
    with pytest.raises(ConfigError, match=message):
        plan_of(plugins={"moon": section})


# ---- device and executor


def test_auto_takes_the_first_in_declared_order_that_can_run_and_says_why(shelf):
    shelf.device("aaa", manifest='after=("*",)')
    shelf.device("fast", refuses="no card found")
    shelf.device("middle", manifest='before=("aaa",)')
    plan = resolve({"profile": "none"})
    assert plan.device.name == plan.config.device == "middle"
    assert "device middle: auto: first that can run here; fast: no card found" in plan.explanation


def test_a_named_device_that_cannot_run_is_never_replaced(toys):
    toys.device("fast", refuses="no card found")
    with pytest.raises(ConfigError, match=r"device = 'fast': .*fast: no card found"):
        resolve({**NONE, "device": "fast"})
    with pytest.raises(ConfigError, match=r"device = 'fats' is not installed; did you mean 'fast'\?"):
        resolve({**NONE, "device": "fats"})


def test_auto_does_not_pass_over_a_broken_device(toys):
    toys.add("fast", "raise RuntimeError('driver')", kind="device")
    with pytest.raises(PluginError, match=r"(?s)the device 'fast'.*driver"):
        resolve({"profile": "none"})
    assert plan_of().device.name == "toy"


def test_auto_leaves_out_what_is_switched_off(toys):
    toys.device("other")
    assert resolve({"profile": "none"}).device.name == "other"
    assert resolve({"profile": "none", "plugins": {"other": False}}).device.name == "toy"
    with pytest.raises(ConfigError, match=r"device = 'toy', but plugins.toy = false"):
        resolve({**NONE, "plugins": {"toy": False}})


def test_no_device_says_what_to_install(shelf):
    with pytest.raises(ConfigError, match="no device is installed: pip install kernel-"):
        resolve({"profile": "none"})


def test_the_section_of_a_device_is_checked_and_an_unused_one_is_mentioned(toys):
    toys.device("other")
    plan = resolve({**NONE, "plugins": {"other": {}}})
    assert plan.explanation[-1] == "[plugins.other] is not used: the device is toy"
    with pytest.raises(ConfigError, match=r"\[plugins.toy\] x: unknown key"):
        resolve({**NONE, "plugins": {"toy": {"x": 1}}})


EXECUTOR = "@hookimpl\ndef make_executor(context, plan): ..."


def test_executor_is_the_named_one_or_the_only_one(toys):
    toys.add("one", EXECUTOR)
    toys.add("two", EXECUTOR)
    toys.add("moon")
    assert plan_of("one").executor == "one"
    assert plan_of("one", "two", executor="two").executor == "two"
    assert plan_of("one", executor="in_process").executor is None
    assert names(plan_of(executor="two")) == ["two"]
    with pytest.raises(ConfigError, match=r"one and two each offer an executor: choose with"):
        plan_of("one", "two")
    with pytest.raises(ConfigError, match=r"executor = 'moon': this plugin has no executor"):
        plan_of(executor="moon")


# ---- exclusive places, services, order


def test_two_drafters_are_named(toys):
    for name in ("hare", "tortoise"):
        toys.add(name, "@hookimpl\ndef make_drafter(context): ...")
    assert names(plan_of("hare")) == ["hare"]
    with pytest.raises(ConfigError, match=r"only one plugin can be the drafter, but 'hare' and 'tortoise' are enabled"):
        plan_of("hare", "tortoise")


def test_exclusive_places_may_be_declared(toys):
    toys.add("hare", manifest='exclusive=("mascot",)')
    toys.add("tortoise", manifest='exclusive=("mascot", "shell")')
    with pytest.raises(ConfigError, match=r"the mascot, but 'hare' and 'tortoise'"):
        plan_of("hare", "tortoise")


def test_services_need_one_provider_of_the_same_major_version(toys):
    toys.add("user", manifest='requires=("light/1",)')
    toys.add("sun", manifest='provides=("light/1",)')
    toys.add("lamp", manifest='provides=("light/1",)')
    toys.add("star", manifest='provides=("light/2",)')
    assert names(plan_of("user", "sun")) == ["sun", "user"]
    with pytest.raises(ConfigError, match=r"'user' needs the service 'light/1', which no enabled plugin provides: enable one"):
        plan_of("user")
    with pytest.raises(ConfigError, match=r"'user' needs .* \(star provides light/2\)"):
        plan_of("user", "star")
    with pytest.raises(ConfigError, match=r"provider of the service light/1, but 'lamp' and 'sun'"):
        plan_of("user", "sun", "lamp")


def test_order_is_declared_then_by_name_and_explained(toys):
    toys.add("a", manifest='after=("c",)')
    toys.add("b")
    toys.add("c", manifest='before=("gone",)')
    toys.add("z", manifest='before=("*",)')
    plan = plan_of("a", "b", "c", "z")
    assert names(plan) == ["z", "b", "c", "a"]
    assert "order: z → b → c → a" in plan.explanation
    assert "order: c before a: a says after" in plan.explanation


def test_a_provider_comes_before_who_requires_it():
    plan = settled(configured("a", requires=("light/1",)), configured("z", provides=("light/1",)))
    assert names(plan) == ["z", "a"]
    assert "order: z before a: it provides light/1" in plan.explanation


def test_a_circle_is_refused_and_named(toys):
    toys.add("a", manifest='before=("b",)')
    toys.add("b", manifest='before=("c",)')
    toys.add("c", manifest='before=("a",)')
    toys.add("d", manifest='after=("c",)')
    with pytest.raises(ConfigError, match=r"circle, (a → b → c → a|b → c → a → b|c → a → b → c) .*a before b: a says before"):
        plan_of("a", "b", "c", "d")


# ---- constraints (pure: no distributions needed)


def configured(name, constraints=(), kind="plugin", section=Section, **manifest):
    """A plugin in memory; `constraints` may be a function of the configuration."""

    def constrain(config, section):
        return constraints(config) if callable(constraints) else constraints

    module = SimpleNamespace(manifest=Manifest(name, "", section=section, **manifest), constrain=hookimpl(constrain))
    return Configured(Found(kind, name, f"module_{name}", f"acme-{name}", "1.0"), module, "configuration")


TOY = configured("toy", kind="device")


def settled(*plugins, device=TOY, **config):
    return settle(KernelConfig.model_validate({"device": "toy", **config}), plugins, [device])


def c(path, *allowed, why="because"):
    return Constraint(path, allowed, why)


class Moon(Section):
    phase: int = 1


def test_a_default_gives_way_and_the_plan_says_to_whom():
    plan = settled(configured("a", [c("engine.block_size", 32, 64, why="tiles")]))
    assert plan.config.engine.block_size == 32
    assert "engine.block_size = 32: a: tiles" in plan.explanation


def test_what_the_user_set_is_obeyed_or_refused_never_changed():
    plugin = configured("a", [c("engine.block_size", 32, 64, why="tiles")])
    assert settled(plugin, engine={"block_size": 64}).config.engine.block_size == 64
    with pytest.raises(ConfigError, match=r"engine.block_size = 16 cannot be: a allows 32, 64 \(tiles\)"):
        settled(plugin, engine={"block_size": 16})


def test_auto_counts_as_not_set():
    plan = settled(configured("a", [c("engine.overlap", False)]), engine={"overlap": "auto"})
    assert plan.config.engine.overlap is False


def test_a_default_that_is_allowed_stays():
    plan = settled(configured("a", [c("engine.max_requests", 1, 256)]))
    assert plan.config.engine.max_requests == 256
    assert not [line for line in plan.explanation if "max_requests" in line]


def test_several_plugins_agree_on_what_they_list_earliest():
    plugins = [configured("a", [c("engine.block_size", 8, 16, 32)]), configured("b", [c("engine.block_size", 32, 16)])]
    assert settled(*plugins).config.engine.block_size == 16


def test_a_conflict_names_both_plugins_and_both_reasons():
    plugins = [
        configured("a", [c("engine.dtype", "float32", why="exact")]),
        configured("b", [c("engine.dtype", "bfloat16", why="fast")]),
    ]
    with pytest.raises(ConfigError, match=r"engine.dtype.*a allows 'float32' \(exact\); b allows 'bfloat16' \(fast\)"):
        settled(*plugins)


def test_a_plugin_refuses_another():
    plugins = [configured("a", [c("plugins.b", False, why="both own the cache")]), configured("b")]
    assert settled(plugins[0]).plugins[0].name == "a"
    with pytest.raises(ConfigError, match=r"b cannot run together with a \(both own the cache\): set `plugins.b = false`"):
        settled(*plugins)


def test_a_plugin_needs_another():
    with pytest.raises(ConfigError, match=r"b is needed by a \(because\): enable it with \[plugins.b\]"):
        settled(configured("a", [c("plugins.b", True)]))


def test_another_plugins_key_can_be_constrained():
    plugins = [configured("a", [c("plugins.moon.phase", 3)]), configured("moon", section=Moon)]
    assert settled(*plugins).config.plugins["moon"] == {"phase": 3}
    assert settled(plugins[0]).config.plugins == {"a": {}, "toy": {}}


def test_the_device_has_a_say_too():
    device = configured("toy", [c("engine.dtype", "bfloat16")], kind="device")
    assert settled(device=device).config.engine.dtype == "bfloat16"


def test_a_constraint_on_the_device_decides_auto():
    plan = settle(
        KernelConfig(), [configured("a", [c("device", "late")])], [TOY, configured("late", kind="device", after=("toy",))]
    )
    assert plan.device.name == plan.config.device == "late"


def test_constraints_may_follow_from_each_other():
    def second(config):
        return [c("engine.max_requests", 1)] if config.engine.block_size == 8 else []

    plan = settled(configured("a", second), configured("b", [c("engine.block_size", 8)]))
    assert plan.config.engine.max_requests == 1


def test_constraints_that_never_settle_are_refused():
    def contrary(config):
        return [] if config.engine.overlap is True else [c("engine.overlap", True)]

    for engine in ({}, {"seed": 1}):
        with pytest.raises(ConfigError, match="constraints of a never settle"):
            settled(configured("a", contrary), engine=engine)


@pytest.mark.parametrize("path", ["engine.blok_size", "engine", "enigne.block_size", "plugins.moon.fase", "a.b.c.d"])
def test_a_constraint_on_nothing_is_the_plugins_error(path):
    with pytest.raises(PluginError, match=f"'a' constrains '{path}', which does not exist"):
        settled(configured("a", [c(path, 1)]), configured("moon", section=Moon))


def test_an_imposed_value_must_be_valid():
    with pytest.raises(ConfigError, match=r"^constraints of a: \[engine\] max_requests: input should be a valid integer"):
        settled(configured("a", [c("engine.max_requests", "many")]))


# ---- the plan


def test_plan_survives_json_and_shows_tampering(toys):
    toys.add("moon", SECTION)
    plan = plan_of(plugins={"moon": {"phase": 3}}, engine={"seed": 7})
    again = ResolvedPlan.from_json(plan.to_json())
    assert again == plan and again.hash == plan.hash and again.config.engine.seed == 7
    document = json.loads(plan.to_json())
    document["plan"]["config"]["engine"]["seed"] = 8
    with pytest.raises(ConfigError, match="hash does not fit"):
        ResolvedPlan.from_json(json.dumps(document).encode())


def test_other_code_in_another_process_is_noticed(toys):
    toys.add("moon")
    plan = plan_of("moon")
    plan.verify_installed()
    for changed, message in (("2.0", "has acme-moon 1.0, the plan was made with 2.0"), ("1.0", "has no acme-sun")):
        entry = replace(plan.plugins[0], version=changed, distribution="acme-sun" if changed == "1.0" else "acme-moon")
        with pytest.raises(ConfigError, match=message):
            replace(plan, plugins=(entry,)).verify_installed()


NAMES = "abcdef"
subset = st.lists(st.sampled_from(NAMES), max_size=2).map(tuple)
values = st.lists(st.sampled_from([8, 16, 32]), min_size=1, max_size=3, unique=True)
wishes = st.lists(st.tuples(st.sampled_from(["engine.block_size", "engine.max_requests"]), values), max_size=2)
worlds = st.lists(st.tuples(subset, subset, wishes), min_size=1, max_size=len(NAMES))


@settings(max_examples=60, deadline=None)
@given(worlds, st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_discovery(world, random):
    """Same plan or same error, and every accepted plan keeps what was declared."""
    plugins = [
        configured(name, [c(path, *allowed) for path, allowed in asked], before=before, after=after)
        for name, (before, after, asked) in zip(NAMES, world)
    ]
    shuffled = random.sample(plugins, len(plugins))
    first, second = (outcome(order) for order in (plugins, shuffled))
    assert first == second
    if isinstance(first, ResolvedPlan):
        place = {entry.name: index for index, entry in enumerate(first.plugins)}
        for plugin in plugins:
            assert all(
                place[plugin.name] < place[other] for other in plugin.manifest.before if other in place and other != plugin.name
            )
            assert all(
                place[plugin.name] > place[other] for other in plugin.manifest.after if other in place and other != plugin.name
            )
        for name, (_, _, asked) in zip(NAMES, world):
            assert all(getattr(first.config.engine, path.split(".")[1]) in allowed for path, allowed in asked), name


def outcome(plugins):
    try:
        return settled(*plugins)
    except ConfigError as error:
        return str(error)
