"""lavintk: adapt a multimodal language model on one GPU and ship it to an edge device.

``train`` and ``load`` are what the command line wraps; they import torch when first used.
"""

from typing import TYPE_CHECKING, Any

from lavintk.errors import LavintkError
from lavintk.hookspecs import hookimpl

if TYPE_CHECKING:
    from lavintk.run import Run, load
    from lavintk.training import train

__version__ = "0.1.0"
__all__ = ["LavintkError", "Run", "__version__", "hookimpl", "load", "train"]

_LAZY = {"train": "lavintk.training", "load": "lavintk.run", "Run": "lavintk.run"}


def __getattr__(name: str) -> Any:
    """Import ``train``, ``load`` and ``Run`` on first use, so that ``import lavintk`` is quick."""
    if name not in _LAZY:
        raise AttributeError(f"module 'lavintk' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
