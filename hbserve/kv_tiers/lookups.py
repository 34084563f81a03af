"""Lookups of blocks in a tier that keeps them by name, in a thread of their own: a tier may take any time."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

from hbserve.kv_tiers.base import BlockName, KVTier
from hbserve.messages.tiers import FindBlocks, FoundBlocks

logger = logging.getLogger(__name__)

_MAX_NAMES = 1024
"""Names in one question: of a long prompt, all but the first are asked for only if those before them are there."""


class Lookups:
    """Answers `FindBlocks`, one after the other.

    Args:
        prefixes: of the blocks' names, by rank, see `BlockName`.
        timeout_s: a lookup that has waited longer is dropped: the scheduler has given it up.
        report: called in the thread with each answer.
    """

    def __init__(
        self, tier: KVTier, prefixes: list[str], timeout_s: float, report: Callable[[FoundBlocks], None]
    ) -> None:
        self._tier, self._prefixes, self._timeout_s, self._report = tier, prefixes, timeout_s, report
        self._queue: queue.SimpleQueue[tuple[float, FindBlocks]] = queue.SimpleQueue()
        # A daemon: a tier that hangs must not keep the process from ending.
        threading.Thread(target=self._run, name="kv-tier-find", daemon=True).start()

    def put(self, command: FindBlocks) -> None:
        """Answer after those before it."""
        self._queue.put((time.monotonic(), command))

    def _run(self) -> None:
        while True:
            put_at, command = self._queue.get()
            if time.monotonic() - put_at > self._timeout_s:
                continue
            num_found, error = 0, None
            try:
                num_found = self._count(command.keys)
            except Exception as failure:  # a user's tier may raise anything
                logger.warning("a KV tier has failed: %r", failure)
                error = str(failure) or repr(failure)
            self._report(
                FoundBlocks(epoch=command.epoch, lookup_id=command.lookup_id, num_found=num_found, error=error)
            )

    def _count(self, keys: list[bytes]) -> int:
        """Count the blocks from the first on that are there for every rank."""
        num_found, most = 0, max(1, _MAX_NAMES // len(self._prefixes))
        for first in range(0, len(keys), most):
            part = keys[first : first + most]
            names = [BlockName(prefix + key.hex(), key) for key in part for prefix in self._prefixes]
            found = list(self._tier.contains(names))
            if len(found) != len(names):
                raise TypeError(f"contains returns one answer for each of {len(names)} names, got {len(found)}")
            first_absent = next((number for number, is_there in enumerate(found) if not is_there), len(names))
            num_found += first_absent // len(self._prefixes)
            if first_absent < len(names):
                break
        return num_found
