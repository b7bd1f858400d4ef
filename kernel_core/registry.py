"""The plugins of one part (face, engine or worker) of an engine: hooks are called here, at build time, one plugin at a time
in resolved order, each with its own context. pluggy validates and registers the implementations."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pluggy
from pydantic import BaseModel

from kernel_core import hookspecs
from kernel_core.contexts import BuildContext, ModelInfo, Part
from kernel_core.discovery import Found, Installed, did_you_mean, load, profile_data
from kernel_core.errors import ConfigError, KernelError, PluginError
from kernel_core.manifest import Manifest, ModelFamily
from kernel_core.request import KERNEL_FIELDS
from kernel_core.settings import validate_section

if TYPE_CHECKING:
    from kernel_core.resolver import ResolvedPlan

HOOKS: dict[str, Any] = {name: f for name, f in vars(hookspecs).items() if hasattr(f, "composes")}
_FORBIDDEN = ("tryfirst", "trylast", "hookwrapper", "wrapper")
_CLOSED_BY_KERNEL = ("make_device", "make_executor")  # their protocols have a `close` that the engine or worker calls


def hooks_of(plugin: Any) -> dict[str, dict[str, Any]]:
    """Hook name → pluggy options of each implementation in a module."""
    mark = hookspecs.PROJECT + "_impl"
    marked = {name: getattr(value, mark, None) for name, value in vars(plugin).items() if inspect.isroutine(value)}
    return {options.get("specname") or name: options for name, options in marked.items() if isinstance(options, dict)}


def check_hooks(name: str, plugin: Any) -> None:
    """Raises PluginError for an unknown hook, a forbidden option, or a signature that does not fit."""
    known = {*HOOKS, *_declared({name: plugin})}
    for hook, options in hooks_of(plugin).items():
        if hook not in known and not options.get("optionalhook"):
            raise PluginError(f"the plugin {name!r} implements {hook!r}, which is no hook{did_you_mean(hook, HOOKS)}")
        used = [option for option in _FORBIDDEN if options.get(option)]
        if used:
            raise PluginError(
                f"the plugin {name!r} marks {hook} as {used[0]}: order is declared in the manifest (before, after), and hooks"
                " are not wrapped"
            )
    plugin_manager({name: plugin})


def plugin_manager(plugins: Mapping[str, Any]) -> pluggy.PluginManager:
    """pluggy calls last registered first, so the last in order is registered first. Raises PluginError."""
    _declared(plugins)
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    for module in _hook_modules(plugins).values():
        manager.add_hookspecs(module)
    for name, plugin in reversed(list(plugins.items())):
        try:
            manager.register(plugin, name)
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"the plugin {name!r} breaks a hook's specification: {error}") from error
    return manager


def _hook_modules(plugins: Mapping[str, Any]) -> dict[str, Any]:
    """Plugin → the module of the hook specifications that it adds."""
    return {name: plugin.add_hookspecs() for name, plugin in plugins.items() if "add_hookspecs" in hooks_of(plugin)}


def _declared(plugins: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    """Hook → (plugin that declares it, specification). Raises PluginError when it is another's."""
    found: dict[str, tuple[str, Any]] = {}
    for plugin, module in _hook_modules(plugins).items():
        for hook, specification in vars(module).items():
            if hasattr(specification, "composes"):
                owner = "the kernel" if hook in HOOKS else found.setdefault(hook, (plugin, specification))[0]
                if owner != plugin:
                    raise PluginError(f"the plugin {plugin!r} declares the hook {hook!r}, which {owner} declares")
    return found


def implementations(manager: pluggy.PluginManager, hook: str) -> dict[str, Callable[..., Any]]:
    """Plugin name → its implementation, taking keywords, in resolved order."""
    found = reversed(getattr(manager.hook, hook).get_hookimpls())
    return {impl.plugin_name: partial(_call_one, impl, hook) for impl in found}


def _call_one(impl: pluggy.HookImpl, hook: str, **arguments: Any) -> Any:
    try:
        return impl.function(*(arguments[name] for name in impl.argnames))
    except KernelError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}:{frame.lineno}"
        raise PluginError(
            f"the plugin {impl.plugin_name!r} failed in {hook}: {type(error).__name__}: {error} ({where})"
        ) from error


@dataclass(frozen=True, slots=True)
class Fields:
    """Registered request fields of one plugin, and the model of its named outputs."""

    request: type[BaseModel] | None = None
    output: type[BaseModel] | None = None


class Registry:
    """Imports the plan's entry-point modules and prebinds their hooks. Made once per part and process, from the same plan."""

    def __init__(self, plan: ResolvedPlan, part: Part, model: ModelInfo) -> None:
        plan.verify_installed()
        self.plan, self.model = plan, model
        self.part: Part = part
        entries = {entry.name: entry for entry in (plan.device, *plan.plugins)}
        modules = {name: load(entry.found) for name, entry in entries.items()}
        self._manifests: dict[str, Manifest] = {name: module.manifest for name, module in modules.items()}
        self._manager = plugin_manager(modules)
        self._declared = _declared(modules)
        self._specifications = HOOKS | {hook: specification for hook, (_, specification) in self._declared.items()}
        self._contexts: dict[str, BuildContext] = {}
        self._services: dict[str, tuple[str, Any]] = {}
        self._building: list[str] = []
        self._made: list[tuple[str, Any]] = []

    # ---- hooks

    def hooks(self, hook: str) -> dict[str, Callable[..., Any]]:
        """Plugin name → its implementation (keywords), in resolved order; for callers that thread a value through a chain."""
        specification = self._specifications[hook]
        if self.part not in specification.parts:
            homes = " and ".join(specification.parts)
            raise PluginError(f"the hook {hook} is at home in {homes}; it was called in the {self.part} part")
        found = implementations(self._manager, hook)
        only = {"make_device": self.plan.device.name, "make_executor": self.plan.executor}
        return {name: call for name, call in found.items() if name == only.get(hook, name)}

    def call(self, hook: str, context: Callable[[str], Any] | None = None, **arguments: Any) -> list[tuple[str, Any]]:
        """(plugin, answer) of every plugin that answers something else than None, in resolved order. `context` makes the
        context of a plugin (None: its BuildContext). Raises PluginError when the hook is not at home here or fails, ConfigError
        when two plugins answer an exclusive one."""
        answers = []
        for name, implementation in self.hooks(hook).items():
            answer = implementation(context=(context or self.context)(name), **arguments)
            if answer is not None:
                answers.append((name, answer))
                if hook not in _CLOSED_BY_KERNEL:
                    self._remember(name, answer)
        if self._specifications[hook].composes == "exclusive" and len(answers) > 1:
            raise ConfigError(exclusive_message(hook.removeprefix("make_"), [name for name, _ in answers]))
        return answers

    def context(self, plugin: str) -> BuildContext:
        """The build context of a plugin in this part; the same object at every call."""
        if plugin not in self._contexts:
            values = self.plan.config.plugins.get(plugin)
            section = validate_section(plugin, self._manifests[plugin].section, values if isinstance(values, Mapping) else {})
            service = partial(self._service_for, plugin)
            more = {"ask": partial(self._ask, plugin), "explanation": self.plan.explanation}
            self._contexts[plugin] = BuildContext(plugin, self.part, section, self.plan.config, self.model, service, **more)
        return self._contexts[plugin]

    def _ask(self, plugin: str, hook: str, **arguments: Any) -> list[tuple[str, Any]]:
        if self._declared.get(hook, ("",))[0] != plugin:
            raise PluginError(f"the plugin {plugin!r} calls the hook {hook!r} and does not declare it in its add_hookspecs")
        return self.call(hook, **arguments)

    # ---- services

    def provider(self, name: str) -> str | None:
        """The enabled plugin that provides a service, if any."""
        return next((plugin for plugin, manifest in self._manifests.items() if name in manifest.provides), None)

    def service(self, name: str, protocol: type | None = None) -> Any:
        """The provider of a service, built once, checked against what the caller uses of it. Raises ConfigError when nobody
        provides it, PluginError when the provider does not fit."""
        return self._service("kernel", name, protocol)

    def _service_for(self, plugin: str, name: str, protocol: type | None = None) -> Any:
        manifest = self._manifests[plugin]
        if name not in (*manifest.requires, *manifest.uses):
            raise PluginError(
                f"the plugin {plugin!r} uses the service {name!r} and does not list it in its manifest's requires or uses"
            )
        if name in manifest.uses and self.provider(name) is None:
            return None
        return self._service(plugin, name, protocol)

    def _service(self, requirer: str, name: str, protocol: type | None) -> Any:
        if name not in self._services:
            self._services[name] = self._build_service(requirer, name)
        plugin, provider = self._services[name]
        wrong = mismatches(provider, protocol) if protocol is not None else []
        if wrong:
            raise PluginError(
                f"the service {name!r} of the plugin {plugin!r} does not fit what {requirer!r} uses of it"
                f" ({protocol.__name__ if protocol else ''}): {'; '.join(wrong)}"
            )
        return provider

    def _build_service(self, requirer: str, name: str) -> tuple[str, Any]:
        plugin = self.provider(name)
        if plugin is None:
            raise ConfigError(f"{requirer!r} needs the service {name!r}, which no enabled plugin provides")
        if name in self._building:
            raise PluginError(f"services need each other in a circle: {' → '.join([*self._building, name])}")
        build = self.hooks("make_service").get(plugin)
        self._building.append(name)
        try:
            provider = build(context=self.context(plugin), name=name) if build else None
        finally:
            self._building.pop()
        if provider is None:
            raise PluginError(f"the plugin {plugin!r} says that it provides {name!r}, but its make_service built nothing for it")
        self._remember(plugin, provider)
        return plugin, provider

    # ---- request fields

    def fields(self) -> dict[str, Fields]:
        """Registered fields by plugin, in resolved order. Raises ConfigError when two plugins, or a plugin and the kernel,
        register one name."""
        owners: dict[tuple[str, str], str] = {("request", name): "the kernel" for name in KERNEL_FIELDS}
        answers = {plugin: ask(context=None) for plugin, ask in self.hooks("register_fields").items()}
        for plugin, models in answers.items():
            unknown = set(models) - {"request", "output"}
            if unknown:
                raise PluginError(f'the plugin {plugin!r} registers fields under {sorted(unknown)}; use "request" or "output"')
            for kind, name in ((kind, name) for kind, model in models.items() for name in model.model_fields):
                owner = owners.setdefault((kind, name), plugin)
                if owner != plugin:
                    raise ConfigError(f"the {kind} field {name!r} is registered by {owner} and {plugin}: enable only one")
        return {plugin: Fields(**models) for plugin, models in answers.items()}

    # ---- end

    def _remember(self, plugin: str, answer: Any) -> None:
        parts = answer if isinstance(answer, list | tuple) else [answer]
        known = {id(made) for _, made in self._made}
        self._made += [(plugin, made) for made in parts if callable(getattr(made, "close", None)) and id(made) not in known]

    def close(self) -> None:
        """Call `close` of everything that plugins made here and that has one, last made first; idempotent. Devices and
        executors are closed by the worker and the engine. Raises PluginError, after all were closed, when one failed."""
        failures = []
        while self._made:
            plugin, made = self._made.pop()
            try:
                made.close()
            except Exception as error:  # noqa: BLE001 - the others must be closed too; reported below
                failures.append(f"{plugin}: {type(error).__name__}: {error}")
        if failures:
            raise PluginError(f"closing failed: {'; '.join(failures)}")


def exclusive_message(place: str, plugins: Iterable[str]) -> str:
    names = " and ".join(repr(name) for name in plugins)
    return f"only one plugin can be the {place}, but {names} are enabled: set `plugins.NAME = false` for all but one"


# ---- services: does a provider fit?


def mismatches(provider: Any, protocol: type) -> list[str]:
    """What a requirer's Protocol asks and the provider lacks: attributes, methods, parameter names."""
    wrong = []
    for name, member in _members(protocol).items():
        if not hasattr(provider, name):
            wrong.append(f"it has no {name!r}")
        elif callable(member):
            wrong += _parameter_mismatch(name, member, getattr(provider, name))
    return wrong


def _members(protocol: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for cls in protocol.__mro__[:-1]:
        if cls.__module__ != "typing":
            found = {**dict.fromkeys(inspect.get_annotations(cls)), **vars(cls), **found}
    return {name: member for name, member in found.items() if not name.startswith("_")}


def _parameter_mismatch(name: str, wanted: Callable[..., Any], given: Any) -> list[str]:
    if not callable(given):
        return [f"{name!r} is not callable"]
    asked = list(inspect.signature(wanted).parameters.values())[1:]
    try:
        has = inspect.signature(given).parameters
    except ValueError:  # a builtin that does not tell
        return []
    kinds = {parameter.kind for parameter in has.values()}
    missing = [] if inspect.Parameter.VAR_KEYWORD in kinds else [p.name for p in asked if p.name not in has and _is_named(p)]
    names = {parameter.name for parameter in asked}
    extra = [p.name for p in has.values() if p.name not in names and p.default is p.empty and _is_named(p)]
    texts = (("does not take", missing), ("demands", extra))
    return [f"{name!r} {text} the parameter{'s' * (len(p) > 1)} {', '.join(p)}" for text, p in texts if p]


def _is_named(parameter: inspect.Parameter) -> bool:
    return parameter.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


# ---- model families


def find_family(architecture: str) -> ModelFamily:
    """The installed family that knows an architecture of config.json; one registered as "*" takes those nobody knows.
    Raises ConfigError with what to install."""
    installed = Installed()
    found = installed.get("model", architecture) or installed.get("model", "*")
    if found is None:
        known = installed.names("model")
        raise ConfigError(
            f"no installed model family knows the architecture {architecture!r}{did_you_mean(architecture, known)}"
            f" (installed: {', '.join(known) or 'none'}). Install the family, or one that takes any architecture:"
            f" pip install {profile_data()['advice']['model']}"
        )
    return _family(found)


def _family(found: Found) -> ModelFamily:
    family = load(found)
    if not isinstance(family, ModelFamily):
        raise PluginError(f"{found.distribution}: {found.module!r} is a {type(family).__name__}, not a ModelFamily")
    return family
