"""Finds plugins by entry point, loads them, and fills the registries.

``LAVINTK_DISABLE=a,b`` leaves plugins out, ``LAVINTK_PLUGINS=builtin`` all that do not come with lavintk.
``LAVINTK_TRACE=1`` prints each hook call. Built-in plugins of this repository are found in the same way as a
stranger's.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import Distribution, EntryPoint, entry_points
from traceback import walk_tb
from typing import TYPE_CHECKING, Any

import pluggy

from lavintk import builtin, hookspecs, plugin_api
from lavintk.errors import LavintkError, PluginError
from lavintk.registry import Registry

if TYPE_CHECKING:
    import click

    from lavintk.contracts import Adapter, DatasetFormat, Evaluation, Exporter, Optimizer, Quantizer

GROUP = "lavintk"
CORE = "core"
"""Name of the plugin that holds the core's own entries (``adamw``, ``none``, ``exact-match``)."""
OWN_DISTRIBUTION = "lavintk"
BUILTIN_ONLY = "builtin"
"""What ``LAVINTK_PLUGINS`` may say."""


@dataclass(frozen=True)
class PluginRecord:
    """What ``lavintk plugins list`` shows of one plugin.

    :param api: version of the plugin interface that it declares; None if it declares none.
    """

    name: str
    version: str
    distribution: str
    api: int | None
    hooks: tuple[str, ...]
    offers: dict[str, list[str]]


@dataclass
class Plugins:
    """The loaded plugins and what they offer."""

    manager: pluggy.PluginManager
    quantizers: Registry[Quantizer] = field(default_factory=lambda: Registry("quantizer"))
    optimizers: Registry[Optimizer] = field(default_factory=lambda: Registry("optimizer"))
    adapters: Registry[Adapter] = field(default_factory=lambda: Registry("adapter"))
    exporters: Registry[Exporter] = field(default_factory=lambda: Registry("exporter"))
    datasets: Registry[DatasetFormat] = field(default_factory=lambda: Registry("dataset format"))
    evaluations: Registry[Evaluation] = field(default_factory=lambda: Registry("evaluation"))
    distributions: dict[str, Distribution] = field(default_factory=dict)
    """Where plugins come from, by name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why plugins that nobody disabled are not here, and what to do, by name."""

    def registries(self) -> dict[str, Registry[Any]]:
        """Return the registries by the plural that names their hook."""
        names = ("quantizers", "optimizers", "adapters", "exporters", "datasets", "evaluations")
        return {name: getattr(self, name) for name in names}

    def names(self) -> list[str]:
        """Return the names of the loaded plugins, the core first."""
        loaded = [name for name, plugin in self.manager.list_name_plugin() if plugin is not None]
        return sorted(loaded, key=lambda name: (name != CORE, name))

    def records(self) -> list[PluginRecord]:
        """Describe every loaded plugin."""
        return [self._record(name, self.distributions.get(name)) for name in self.names()]

    def call(self, hook: str, **arguments: Any) -> None:
        """Call a hook of each plugin in turn; a fault names plugin and hook.

        :raises PluginError: an implementation raised something that is not a :class:`LavintkError`.
        """
        for name in self.names():
            self.call_one(name, hook, **arguments)

    def call_one(self, plugin: str, hook: str, **arguments: Any) -> None:
        """Call ``hook`` of one plugin only."""
        others = [other for _, other in self.manager.list_name_plugin() if other is not None]
        others.remove(self.manager.get_plugin(plugin))
        try:
            self.manager.subset_hook_caller(hook, remove_plugins=others)(**arguments)
        except LavintkError:
            raise
        except Exception as error:
            raise PluginError(
                f"plugin {plugin!r} failed in {hook}: {type(error).__name__}: {error}\n"
                f"skip it with LAVINTK_DISABLE={plugin}"
            ) from error

    def add_commands(self, group: click.Group) -> None:
        """Let plugins add their commands to ``group``.

        :raises PluginError: a plugin uses the name of a command that exists.
        """
        taken = dict.fromkeys(group.commands, "lavintk")
        for plugin in self.names():
            before = dict(group.commands)
            self.call_one(plugin, "lavintk_register_commands", group=group)
            for name, command in group.commands.items():
                if name in before and before[name] is not command:
                    raise PluginError(
                        f"command {name!r} of plugin {plugin!r} clashes with that of {taken[name]!r}: "
                        f"skip the plugin with LAVINTK_DISABLE={plugin}"
                    )
                taken.setdefault(name, plugin)

    def blame(self, error: BaseException) -> str:
        """Say through which plugin's code an unexpected error came last, and the way out; empty if through none's."""
        owners = {_package_of(self.manager.get_plugin(name)): name for name in self.names() if name != CORE}
        for frame, line in reversed(list(walk_tb(error.__traceback__))):
            name = owners.get(frame.f_globals.get("__name__", "").partition(".")[0])
            if name is not None:
                code = frame.f_code
                return (
                    f"this came through plugin {name!r}: {code.co_name}, {code.co_filename}, line {line}; "
                    f"skip the plugin with LAVINTK_DISABLE={name}"
                )
        return ""

    def _record(self, name: str, distribution: Distribution | None) -> PluginRecord:
        plugin = self.manager.get_plugin(name)
        hooks = tuple(sorted(caller.name for caller in self.manager.get_hookcallers(plugin) or []))
        offers = {
            plural: [entry.name for entry in registry if entry.owner == name]
            for plural, registry in self.registries().items()
        }
        if distribution is not None:
            version, distribution_name = distribution.version, distribution.name
        else:
            version, distribution_name = _own_version(), OWN_DISTRIBUTION
        api = plugin_api.declared(plugin, type(plugin).__module__)
        return PluginRecord(name, version, distribution_name, api, hooks, {k: v for k, v in offers.items() if v})


def load_plugins(disabled: frozenset[str] = frozenset(), *, builtin_only: bool = False) -> Plugins:
    """Load every installed plugin except the disabled ones and let them register what they offer.

    A plugin that wants a version of the interface that this lavintk does not speak is left out: see
    :attr:`Plugins.left_out`.

    :param builtin_only: leave out all that do not come with lavintk.
    :raises PluginError: a plugin fails to load, is offered twice, misspells a hook, or two offer one name.
    """
    plugins = Plugins(_new_manager())
    for name in disabled:
        plugins.manager.set_blocked(name)
    for name, points in found_points(disabled, builtin_only=builtin_only).items():
        _load_one(plugins, name, points)
    try:
        plugins.manager.check_pending()  # without it a misspelt hook name is accepted silently
    except pluggy.PluginValidationError as error:
        name = _plugin_name(plugins.manager, error)
        raise PluginError(f"{error}\nskip the plugin with LAVINTK_DISABLE={name}") from error
    for plugin in plugins.names():
        for plural, registry in plugins.registries().items():
            plugins.call_one(plugin, f"lavintk_register_{plural}", registry=registry.owned_by(plugin))
    return plugins


@functools.cache
def installed_plugins() -> Plugins:
    """Return the plugins of this process, loaded once, with ``LAVINTK_DISABLE`` and ``LAVINTK_PLUGINS`` applied.

    Which ones had to be left out is said on stderr.
    """
    plugins = load_plugins(disabled_names(), builtin_only=only_builtin())
    for reason in plugins.left_out.values():
        print(reason, file=sys.stderr)
    return plugins


def disabled_names() -> frozenset[str]:
    """Return the plugin names that ``LAVINTK_DISABLE`` lists, separated by commas."""
    return frozenset(filter(None, (name.strip() for name in os.environ.get("LAVINTK_DISABLE", "").split(","))))


def only_builtin() -> bool:
    """Whether ``LAVINTK_PLUGINS=builtin`` asks for the plugins that come with lavintk alone.

    :raises PluginError: it says something else.
    """
    wish = os.environ.get("LAVINTK_PLUGINS", "").strip()
    if wish not in ("", BUILTIN_ONLY):
        raise PluginError(
            f"LAVINTK_PLUGINS={wish} means nothing: set it to {BUILTIN_ONLY} to leave out all plugins that do not come "
            "with lavintk, or unset it. LAVINTK_DISABLE leaves out single ones."
        )
    return wish == BUILTIN_ONLY


def installed_names() -> frozenset[str]:
    """Return the names of all installed plugins, disabled ones among them; none is loaded."""
    return frozenset({CORE, *entry_points(group=GROUP).names})


def found_points(disabled: frozenset[str], *, builtin_only: bool = False) -> dict[str, list[EntryPoint]]:
    """Return the entry points of the plugins to load by name, in the order of loading; several are a clash."""
    points: dict[str, list[EntryPoint]] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        if point.name not in disabled and (not builtin_only or _is_own(point)):
            points.setdefault(point.name, []).append(point)
    return points


def _is_own(point: EntryPoint) -> bool:
    return point.dist is not None and point.dist.name == OWN_DISTRIBUTION


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    if os.environ.get("LAVINTK_TRACE", "") not in ("", "0"):
        manager.add_hookcall_monitoring(_trace_before, _trace_after)
    manager.register(builtin, CORE)
    return manager


def _load_one(plugins: Plugins, name: str, points: Sequence[EntryPoint]) -> None:
    """Load by name, one at a time, so that a message can say which plugin failed and the way out."""
    owners = sorted({point.dist.name for point in points if point.dist})
    if len(owners) > 1:
        raise PluginError(f"plugin {name!r} is offered by {' and '.join(owners)}: uninstall one of them")
    if name == CORE:
        raise PluginError(f"plugin {name!r} of {owners[0]} uses the core's own name: rename its entry point")
    point = points[0]
    try:
        plugin = point.load()
        reason = plugin_api.why_left_out(point, plugin_api.declared(plugin, point.module))
        if not reason:
            plugins.manager.register(plugin, name)
    except (Exception, SystemExit) as error:
        reason = plugin_api.why_left_out(point, plugin_api.declared_in_source(point.module))
        if not reason:
            raise PluginError(
                f"plugin {name!r} of {', '.join(owners)} failed to load: {type(error).__name__}: {error}\n"
                f"skip it with LAVINTK_DISABLE={name}"
            ) from error
    if reason:
        plugins.left_out[name] = reason
    elif point.dist is not None:
        plugins.distributions[name] = point.dist


def _package_of(plugin: object) -> str:
    """Return the top-level package of a plugin, which is a module or an object."""
    name: str = getattr(plugin, "__name__", type(plugin).__module__)
    return name.partition(".")[0]


def _plugin_name(manager: pluggy.PluginManager, error: pluggy.PluginValidationError) -> str:
    return manager.get_name(error.plugin) or str(error.plugin)


def _own_version() -> str:
    from lavintk import __version__

    return __version__


def _trace_before(hook_name: str, hook_impls: Any, arguments: Any) -> None:
    if hook_impls:
        owners = ", ".join(implementation.plugin_name for implementation in hook_impls)
        print(f"trace: {hook_name}({_shown(arguments)}) -> {owners}", file=sys.stderr)


def _trace_after(outcome: pluggy.Result[Any], hook_name: str, hook_impls: Any, arguments: Any) -> None:
    if hook_impls and outcome.exception is not None:
        print(f"trace: {hook_name} raised {outcome.exception!r}", file=sys.stderr)


def _shown(arguments: Any) -> str:
    return ", ".join(f"{name}={_shorten(value)}" for name, value in arguments.items())


def _shorten(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
