"""Versions of the plugin interface: which ones this lavintk speaks, and which one a plugin was written for.

The interface is what ``docs/plugins`` documents: hooks, contracts, registry, layers. Its version is a whole number that
rises only where something a plugin relies on is taken away; additions keep it. A plugin declares the one it was written
for beside its hooks: ``lavintk_api = 1``.
"""

from __future__ import annotations

import ast
import sys
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

from lavintk.errors import PluginError

SUPPORTED = (1,)
"""Versions that plugins may declare, the current one last; the ones before it still work, but are going."""
ASSUMED = 1
"""Version of plugins that declare none: it was not asked for at first."""
ATTRIBUTE = "lavintk_api"


def declared(plugin: object, module: str = "") -> int | None:
    """Return the version that a loaded plugin, or else the module it stands in, declares; None if it declares none.

    :raises PluginError: what is declared is no whole number.
    """
    found = getattr(plugin, ATTRIBUTE, getattr(sys.modules.get(module), ATTRIBUTE, None))
    if found is not None and type(found) is not int:
        raise PluginError(f"{ATTRIBUTE} = {found!r} is no whole number; write {ATTRIBUTE} = {SUPPORTED[-1]}")
    return found


def declared_in_source(module: str) -> int | None:
    """Return the version that the source of ``module`` declares, without running it; None if that cannot be seen.

    For plugins that cannot be imported: one that wants another version often fails there already.
    """
    try:
        spec = find_spec(module)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else ast.Module([], [])
    except (ImportError, OSError, SyntaxError, ValueError):
        return None
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Name) and target.id == ATTRIBUTE for target in node.targets)
            and isinstance(node.value, ast.Constant)
            and type(node.value.value) is int
        ):
            return node.value.value
    return None


def why_left_out(point: EntryPoint, version: int | None) -> str:
    """Return why a plugin of ``version`` cannot be used and what to do, or an empty string if it can.

    :param version: what it declares; None stands for :data:`ASSUMED`.
    """
    wanted = ASSUMED if version is None else version
    if wanted in SUPPORTED:
        return ""
    from lavintk import __version__

    distribution = point.dist.name if point.dist else "unknown"
    owner = f"{distribution} {point.dist.version}" if point.dist else distribution
    update = "lavintk" if wanted > SUPPORTED[-1] else distribution
    return (
        f"plugin {point.name!r} of {owner} is left out: it wants version {wanted} of lavintk's plugin interface, "
        f"and lavintk {__version__} has {_listed()}.\n"
        f"pip install --upgrade {update} may help; LAVINTK_DISABLE={point.name} takes this message away"
    )


def _listed() -> str:
    return " and ".join(map(str, SUPPORTED))
