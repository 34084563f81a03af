"""Sealed blocks that wait to be stored in KV tiers, and how many leave at once.

Blocks that wait are held by their requests and the prefix cache alone. So a tier that is slower than the device, as
disks and stores are, takes no memory from requests: contents that were evicted before their turn are not stored.
"""

from __future__ import annotations

import math
from collections import OrderedDict, defaultdict
from collections.abc import Iterable

from hbserve.kv_cache.tier_directory import TierEntry
from hbserve.messages.tiers import StoreBlocks
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.tiers.copies import Copies, Copy, HeldBlocks, copying_worker
from hbserve.scheduler.tiers.tier import Tier

_MAX_STORE_BYTES = 64 << 20
"""Bytes of one store job. It holds its blocks until all of it has been copied."""
_MIN_STORE_BYTES = 16 << 20
"""Bytes that are worth a store job at once. Decoding sequences seal a few blocks in each step, and a job for each step
would cost scheduler and workers as many messages as the steps themselves."""
_MIN_STORE_SHARE = 1 / 16
"""The same as a share of the pool's blocks, for small pools, which soon need these for others."""
_MAX_STORE_DELAY_S = 0.2
"""How long fewer bytes wait for others. A tier that keeps blocks by name waits so long for as many as a job may have:
each call of a store costs messages to its master and memory."""
_MAX_STORE_JOBS = 2
"""Store jobs in flight at one instance and tier: one is copied while the next one is on its way."""

_Waiting = OrderedDict[bytes, float]
"""Contents by prefix hash, each with the time from which on they do not wait for others."""


class StoreQueue:
    """Contents that wait, by instance and tier.

    Args:
        copies: where store jobs go.
    """

    def __init__(self, clock: Clock, copies: Copies) -> None:
        self._clock, self._copies = clock, copies
        self._waiting: defaultdict[tuple[InstanceHandle, Tier], _Waiting] = defaultdict(OrderedDict)
        self._num_jobs = 0
        self._next_look = -math.inf

    def offer(self, instance: InstanceHandle, tier: Tier, keys: Iterable[bytes]) -> None:
        """Have contents wait that were just sealed, where they are absent."""
        waiting = self._waiting[instance, tier]
        due = self._clock.now + _MAX_STORE_DELAY_S
        for key in keys:
            if key not in tier.directory:
                waiting.setdefault(key, due)
        while len(waiting) > instance.pool.total_blocks:  # the pool has lost the oldest ones
            waiting.popitem(last=False)
            tier.directory.stats.skipped_blocks += 1

    def dispatch(self) -> None:
        """Send contents on their way, as many as may be under way at a time. A tier that rests gets none."""
        for (instance, tier), waiting in self._waiting.items():
            if waiting and tier.rests_until > self._clock.now:
                tier.directory.stats.skipped_blocks += len(waiting)
                waiting.clear()
            while self._are_due(instance, tier, waiting) and self._copies.num_stores(instance, tier) < _MAX_STORE_JOBS:
                if not self._store(instance, tier, waiting):
                    break

    def _are_due(self, instance: InstanceHandle, tier: Tier, waiting: _Waiting) -> bool:
        """Whether a store job is worth its messages, or its contents have waited long enough."""
        if not waiting or instance.hello is None:
            return False
        num_bytes = _MAX_STORE_BYTES if tier.info.by_name else _MIN_STORE_BYTES
        share = _MIN_STORE_SHARE * instance.pool.total_blocks
        if len(waiting) >= min(share, num_bytes / instance.hello.block_bytes):
            return True
        now, due = self._clock.now, next(iter(waiting.values()))
        if due > now and not now < self._next_look <= due:
            self._next_look = due
            self._clock.call_at(due)
        return due <= now

    def _store(self, instance: InstanceHandle, tier: Tier, waiting: _Waiting) -> bool:
        """Send one job with the contents that have waited longest; False: there is no worker."""
        worker = copying_worker(instance)
        if worker is None or instance.hello is None:
            return False
        pool, directory = instance.pool, tier.directory
        entries: list[TierEntry] = []
        while waiting and len(entries) < max(1, _MAX_STORE_BYTES // instance.hello.block_bytes):
            key, _ = waiting.popitem(last=False)
            if key in directory:
                continue
            entry = directory.begin_store(key) if pool.count_cached_prefix((key,)) else None
            if entry is None:
                directory.stats.skipped_blocks += 1
            else:
                entries.append(entry)
        if not entries:
            return True
        self._num_jobs += 1
        keys = [entry.key for entry in entries]
        held = HeldBlocks(pool, f"store {self._num_jobs}")
        block_ids = pool.hold(held.holder, keys)
        job = Copy(instance, worker, tier, entries, held, instance.hello.block_bytes)
        job_id = self._copies.begin(job)
        worker.send(
            StoreBlocks(
                epoch=worker.epoch,
                job_id=job_id,
                tier=tier.info.name,
                keys=keys,
                slots=[entry.slot for entry in entries],
                block_ids=block_ids,
            )
        )
        return True

    def on_memory_lost(self, instance: InstanceHandle) -> None:
        """An instance's pool is gone: what waits there is not stored."""
        for key in [key for key in self._waiting if key[0] is instance]:
            del self._waiting[key]
