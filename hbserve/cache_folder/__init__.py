"""The folder in which HBServe keeps what it can make again: ``$HBSERVE_CACHE`` or ``~/.cache/hbserve``."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "HBSERVE_CACHE"


def cache_folder() -> Path:
    """Return the cache folder, which need not exist yet."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "hbserve"
