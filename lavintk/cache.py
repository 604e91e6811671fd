"""Where lavintk keeps what it fetched or converted: the user's cache directory."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the cache directory: ``LAVINTK_CACHE`` if set, else the platform's place for ``lavintk``.

    The directory need not exist yet; who writes into it creates it.
    """
    chosen = os.environ.get("LAVINTK_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("lavintk", appauthor=False)
