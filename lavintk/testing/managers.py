"""A plugin manager for a test, into which it registers its own plugin."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import pluggy

from lavintk import plugins as loading
from lavintk.errors import PluginError
from lavintk.plugins import GROUP, Plugins, installed_plugins

if TYPE_CHECKING:
    import pytest

OWN_DISTRIBUTION = "lavintk"


class PluginManager:
    """lavintk's own plugins, and those that a test registers.

    :ivar plugins: what is loaded, with a registry of each kind: ``manager.plugins.quantizers.create(choice)``.
    """

    def __init__(self) -> None:
        self._load: Callable[..., Plugins] = loading.load_plugins
        self._registered: dict[str, object] = {}
        self.plugins = self._make()

    def register(self, plugin: object, name: str) -> None:
        """Load ``plugin``, a module or any object with hooks, as if an entry point ``name`` had named it.

        :raises PluginError: the name is taken, a hook is misspelt or failed, or another plugin offers the same.
        """
        if name in self.plugins.names():
            raise PluginError(f"there is a plugin {name!r} already: register yours under another name")
        self._add(self.plugins, name, plugin)
        self._registered[name] = plugin
        installed_plugins.cache_clear()

    def take_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process see these plugins instead of the installed ones until ``monkeypatch`` is undone."""
        monkeypatch.setattr(loading, "load_plugins", self._make)
        installed_plugins.cache_clear()

    def forget(self) -> None:
        """Let the process load its plugins anew."""
        installed_plugins.cache_clear()

    def _make(self, disabled: frozenset[str] = frozenset(), *others: Any, **settings: Any) -> Plugins:
        """Load lavintk's own plugins and the registered ones; signature of :func:`lavintk.plugins.load_plugins`."""
        strangers = {p.name for p in entry_points(group=GROUP) if p.dist is None or p.dist.name != OWN_DISTRIBUTION}
        made = self._load(disabled | strangers, *others, **settings)
        for name, plugin in self._registered.items():
            if name not in disabled:
                self._add(made, name, plugin)
        return made

    @staticmethod
    def _add(plugins: Plugins, name: str, plugin: object) -> None:
        plugins.manager.unblock(name)  # an installed one of that name was left out
        plugins.manager.register(plugin, name)
        try:
            plugins.manager.check_pending()
        except pluggy.PluginValidationError as error:
            plugins.manager.unregister(name=name)
            raise PluginError(f"plugin {name!r}: {error}") from error
        for plural, registry in plugins.registries().items():
            plugins.call_one(name, f"lavintk_register_{plural}", registry=registry.owned_by(name))
