"""Finds plugins by entry point, loads them, and fills the registries.

``LAVINTK_DISABLE=a,b`` leaves plugins out, ``LAVINTK_TRACE=1`` prints each hook call. Built-in plugins of
this repository are found in the same way as a stranger's.
"""

from __future__ import annotations

import functools
import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import Distribution, entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from lavintk import builtin, hookspecs
from lavintk.errors import LavintkError, PluginError
from lavintk.registry import Registry

if TYPE_CHECKING:
    import click

    from lavintk.contracts import Adapter, DatasetFormat, Evaluation, Exporter, Optimizer, Quantizer

GROUP = "lavintk"
CORE = "core"
"""Name of the plugin that holds the core's own entries (``adamw``, ``none``, ``exact-match``)."""


@dataclass(frozen=True)
class PluginRecord:
    """What ``lavintk plugins list`` shows of one plugin."""

    name: str
    version: str
    distribution: str
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
        distributions = dict(self.manager.list_plugin_distributions())
        return [self._record(name, distributions.get(self.manager.get_plugin(name))) for name in self.names()]

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
            version, distribution_name = _own_version(), "lavintk"
        return PluginRecord(name, version, distribution_name, hooks, {k: v for k, v in offers.items() if v})


def load_plugins(disabled: frozenset[str] = frozenset()) -> Plugins:
    """Load every installed plugin except the disabled ones and let them register what they offer.

    :raises PluginError: a plugin fails to load, is offered twice, misspells a hook, or two offer one name.
    """
    plugins = Plugins(_load_manager(disabled))
    for plugin in plugins.names():
        for plural, registry in plugins.registries().items():
            plugins.call_one(plugin, f"lavintk_register_{plural}", registry=registry.owned_by(plugin))
    return plugins


@functools.cache
def installed_plugins() -> Plugins:
    """Return the plugins of this process, loaded once, with ``LAVINTK_DISABLE`` applied."""
    return load_plugins(disabled_names())


def disabled_names() -> frozenset[str]:
    """Return the plugin names that ``LAVINTK_DISABLE`` lists, separated by commas."""
    return frozenset(filter(None, (name.strip() for name in os.environ.get("LAVINTK_DISABLE", "").split(","))))


def installed_names() -> frozenset[str]:
    """Return the names of all installed plugins, disabled ones among them; none is loaded."""
    return frozenset({CORE, *entry_points(group=GROUP).names})


def _load_manager(disabled: frozenset[str]) -> pluggy.PluginManager:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    if os.environ.get("LAVINTK_TRACE", "") not in ("", "0"):
        manager.add_hookcall_monitoring(_trace_before, _trace_after)
    manager.register(builtin, CORE)
    for name in disabled:
        manager.set_blocked(name)
    for name in sorted(entry_points(group=GROUP).names - disabled):
        _load_one(manager, name)
    try:
        manager.check_pending()  # without it a misspelt hook name is accepted silently
    except pluggy.PluginValidationError as error:
        raise PluginError(f"{error}\nskip the plugin with LAVINTK_DISABLE={_plugin_name(manager, error)}") from error
    return manager


def _load_one(manager: pluggy.PluginManager, name: str) -> None:
    """Load by name, one at a time, so that a message can say which plugin failed and the way out."""
    owners = sorted({point.dist.name for point in entry_points(group=GROUP, name=name) if point.dist})
    if len(owners) > 1:
        raise PluginError(f"plugin {name!r} is offered by {' and '.join(owners)}: uninstall one of them")
    if name == CORE:
        raise PluginError(f"plugin {name!r} of {owners[0]} uses the core's own name: rename its entry point")
    try:
        manager.load_setuptools_entrypoints(GROUP, name=name)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"plugin {name!r} of {', '.join(owners)} failed to load: {type(error).__name__}: {error}\n"
            f"skip it with LAVINTK_DISABLE={name}"
        ) from error


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
