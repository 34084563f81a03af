"""A KV tier that keeps each block in a file, for `benchmarks.kv_tier_random`: a class of a user's own.

A file named ``hangs`` in the folder makes all calls wait, and one named ``fails`` makes them raise.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from hbserve.kv_tiers.base import BlockName, KVTier, KVTierContext

FOLDER_VARIABLE = "HBSERVE_BENCHMARK_TIER_FOLDER"
"""Environment variable that names the folder."""
_POLL_S = 0.05
_KEPT_SHARE = 0.9


class FolderTier(KVTier):
    """Files of values; those that were written first go when all together are larger than ``kv_cache.store.bytes``."""

    def __init__(self, context: KVTierContext) -> None:
        self._folder = Path(os.environ[FOLDER_VARIABLE])
        self._max_files = max(1, context.config.bytes // context.value_bytes)
        self._num_put = 0

    def put(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        self._suffer()
        for name, value in zip(names, values, strict=True):
            part = self._folder / f"{name.text.replace('/', '_')}.{threading.get_native_id()}.part"
            part.write_bytes(value.numpy().data)
            part.rename(self._path(name))
        self._num_put += len(names)
        if self._num_put > self._max_files / 20:
            self._num_put = 0
            self._evict()
        return {}

    def get(self, names: Sequence[BlockName], values: torch.Tensor) -> dict[int, str]:
        self._suffer()
        missing = {}
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            try:
                with self._path(name).open("rb", buffering=0) as file:
                    file.readinto(value.numpy().data)
            except FileNotFoundError:
                missing[place] = "missing"
        return missing

    def contains(self, names: Sequence[BlockName]) -> list[bool]:
        self._suffer()
        return [self._path(name).exists() for name in names]

    def remove(self, names: Sequence[BlockName]) -> None:
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: BlockName) -> Path:
        return self._folder / f"{name.text.replace('/', '_')}.value"

    def _suffer(self) -> None:
        while (self._folder / "hangs").exists():
            time.sleep(_POLL_S)
        if (self._folder / "fails").exists():
            raise OSError("the folder fails")

    def _evict(self) -> None:
        files = sorted(self._folder.glob("*.value"), key=_written_at)
        for path in files[: max(0, len(files) - int(_KEPT_SHARE * self._max_files))]:
            path.unlink(missing_ok=True)


def _written_at(path: Path) -> float:
    with suppress(FileNotFoundError):  # another process has evicted it
        return path.stat().st_mtime
    return 0.0
