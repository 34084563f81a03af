"""The cache folder of the tests: what they fetch once from registries. The processes that they start use it too."""

from __future__ import annotations

import os
from pathlib import Path

from hbserve.cache_folder import CACHE_VARIABLE
from hbserve.model_store.cache import kept_folder

__all__ = ["kept_folder"]

_USER_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
os.environ.setdefault(CACHE_VARIABLE, str(_USER_CACHE / "hbserve-tests"))
