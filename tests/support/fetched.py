"""Folders that tests make once, of what registries have, and keep in a cache folder."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def kept_folder(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder of this name; make it first if it is not there.

    Args:
        make: fills a folder, which exists. If it fails, no folder is kept.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    cache = (Path(root) if root else Path.home() / ".cache") / "hbserve-tests"
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / name
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes may want it at once
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache) as temporary:
                made = Path(temporary) / "made"
                made.mkdir()
                make(made)
                made.rename(folder)
    return folder
