"""The exporter ``plain``: a plain folder of transformers' with the adapter folded in, one file of fp32 weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lavintk import hookimpl

if TYPE_CHECKING:
    from lavintk.contracts import Exporter
    from lavintk.registry import NoOptions, Registry

lavintk_api = 1


def make_plain(options: NoOptions) -> Exporter:
    """Return the exporter."""
    from lavintk_plain.export import PlainExporter  # brings torch, which every start of lavintk should not wait for

    return PlainExporter()


@hookimpl
def lavintk_register_exporters(registry: Registry[Exporter]) -> None:
    """Offer ``plain``."""
    registry.add("plain", make_plain, summary="a folder of transformers' with the adapter folded in, fp32")
