"""``lavintk import``: the group to which plugins add what they can import."""

from __future__ import annotations

import click

from lavintk.errors import PluginError


class ImportGroup(click.Group):
    """A group of commands in which no plugin can take another's name."""

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add the importer of a plugin.

        :raises PluginError: the name is in use.
        """
        name = name or cmd.name or ""
        if name in self.commands and self.commands[name] is not cmd:
            raise PluginError(f"two plugins offer 'lavintk import {name}': skip one of them with LAVINTK_DISABLE")
        super().add_command(cmd, name)


def make_import() -> click.Group:
    """Return the group, empty: plugins fill it in ``lavintk_register_commands``."""
    return ImportGroup(
        "import",
        help="Make a run of a checkpoint from elsewhere.",
        no_args_is_help=True,
    )
