"""A plugin manager for a test, into which it registers its own plugin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

from lavintk import plugin_api
from lavintk import plugins as loading
from lavintk.errors import PluginError
from lavintk.plugins import Plugins, installed_plugins

if TYPE_CHECKING:
    import pytest


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

        :raises PluginError: the name is taken, it wants another version of the plugin interface, a hook is misspelt or
            failed, or another plugin offers the same. It is not loaded then.
        """
        if name in self.plugins.names():
            raise PluginError(f"there is a plugin {name!r} already: register yours under another name")
        version = plugin_api.declared(plugin, type(plugin).__module__)
        if version is not None and version not in plugin_api.SUPPORTED:
            known = ", ".join(map(str, plugin_api.SUPPORTED))
            raise PluginError(f"plugin {name!r} wants version {version} of the plugin interface; known: {known}")
        self._registered[name] = plugin
        try:
            self.plugins = self._make()
        except PluginError:
            del self._registered[name]
            raise
        installed_plugins.cache_clear()

    def take_over(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process see these plugins instead of the installed ones until ``monkeypatch`` is undone."""
        monkeypatch.setattr(loading, "load_plugins", self._make)
        installed_plugins.cache_clear()

    def forget(self) -> None:
        """Let the process load its plugins anew."""
        installed_plugins.cache_clear()

    def _make(self, disabled: frozenset[str] = frozenset(), *, builtin_only: bool = True) -> Plugins:
        """Load lavintk's own plugins and the registered ones, as :func:`lavintk.plugins.load_plugins` would."""
        made = self._load(disabled, builtin_only=True)
        for name, plugin in self._registered.items():
            if name not in disabled:
                self._add(made, name, plugin)
        return made

    @staticmethod
    def _add(plugins: Plugins, name: str, plugin: object) -> None:
        plugins.manager.register(plugin, name)
        try:
            plugins.manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise PluginError(f"plugin {name!r}: {error}") from error
        for plural, registry in plugins.registries().items():
            plugins.call_one(name, f"lavintk_register_{plural}", registry=registry.owned_by(name))
