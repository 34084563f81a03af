"""Faults of KV tiers while they are used, for `benchmarks.kv_tier_random`."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from benchmarks.kv_store import RunningStore

_INTERVAL_S = 15.0
_LASTS_S = 4.0
_CHANGED_BYTES = 200
_CHANGED_FILES = 8


class Faults:
    """Faults, one after the other.

    Attributes:
        disk: folder of the disk tier; None: there is none.
        folder: folder of a `benchmarks.folder_tier.FolderTier`; None: there is none.
        store: the Mooncake Store that runs; None: there is none.
        counts: how often each was made.
    """

    disk: Path | None = None
    folder: Path | None = None
    store: RunningStore | None = None

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng([seed, 1 << 20])
        self.counts = dict.fromkeys(("changed bytes", "short files", "lost files", "hangs", "fails", "killed"), 0)

    def expected(self, name: str, are_made: bool) -> set[str]:
        """Return the failures that a tier may have. A store evicts on its own, and says that it is full."""
        kinds = {"full", "missing"} if name == "store" else set()
        if are_made and name == "disk":
            kinds = {"checksum"}
        elif are_made and name == "store":
            kinds |= {"checksum", "timeout", "late", "lookup", "backend"}
        return kinds

    async def make(self) -> None:
        """Make faults until it is cancelled. The store is killed seldom: it ends after ten restarts in ten minutes."""
        while True:
            for make in (self._damage, self._hang, self._damage, self._fail):
                await asyncio.sleep(_INTERVAL_S)
                await make()

    async def _damage(self) -> None:
        """Change bytes that are not zero in files of the disk and the folder; cut and remove some of the folder."""
        for path in [] if self.disk is None else self.disk.glob("*.kv"):
            self._change_bytes(path, _CHANGED_BYTES)
        files = [] if self.folder is None else sorted(self.folder.glob("*.value"))
        for path in [files[number] for number in self._random.permutation(len(files))[:_CHANGED_FILES].tolist()]:
            with suppress(FileNotFoundError):  # it was evicted
                match int(self._random.integers(4)):
                    case 0:
                        os.truncate(path, int(self._random.integers(path.stat().st_size)))
                        self.counts["short files"] += 1
                    case 1:
                        path.unlink()
                        self.counts["lost files"] += 1
                    case _:
                        self._change_bytes(path, 1)

    def _change_bytes(self, path: Path, number: int) -> None:
        with path.open("r+b", buffering=0) as file:
            for place in self._random.integers(path.stat().st_size, size=number).tolist():
                file.seek(place)
                [value] = file.read(1)
                if value:
                    file.seek(place)
                    file.write(bytes([value ^ 1]))
                    self.counts["changed bytes"] += 1

    async def _hang(self) -> None:
        """Stop a process of the store, or all calls of the folder's tier, for a while."""
        pids = [] if self.store is None else self.store.pids()
        if pids:
            pid = int(self._random.choice(pids))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                self.counts["hangs"] += 1
                try:
                    await asyncio.sleep(_LASTS_S)
                finally:
                    os.kill(pid, signal.SIGCONT)
        elif self.folder is not None:
            self.counts["hangs"] += 1
            with _file(self.folder / "hangs"):
                await asyncio.sleep(_LASTS_S)

    async def _fail(self) -> None:
        """Kill a process of the store, or have all calls of the folder's tier fail for a while."""
        pids = [] if self.store is None else self.store.pids()
        if pids:
            with suppress(ProcessLookupError):
                os.kill(int(self._random.choice(pids)), signal.SIGKILL)
                self.counts["killed"] += 1
        elif self.folder is not None:
            self.counts["fails"] += 1
            with _file(self.folder / "fails"):
                await asyncio.sleep(_LASTS_S)


@contextmanager
def _file(path: Path) -> Iterator[None]:
    path.touch()
    try:
        yield
    finally:
        path.unlink()
