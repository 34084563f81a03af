"""Sealed blocks that wait to be stored in KV tiers, and how many leave at once."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from hbserve.messages.tiers import StoreBlocks
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import KVAllocation
from hbserve.scheduler.tiers.copies import Copies, Copy, copying_worker
from hbserve.scheduler.tiers.tier import Tier

_MAX_STORE_BYTES = 64 << 20
"""Bytes of one store job. Its blocks stay pinned until all of it has been copied."""
_MIN_STORE_BYTES = 16 << 20
"""Bytes that are worth a store job at once. Decoding sequences seal a few blocks in each step, and a job for each step
would cost scheduler and workers as many messages as the steps themselves."""
_MAX_STORE_DELAY_S = 0.02
"""How long fewer bytes wait for others, to the next step of the scheduler. A sequence that has just sealed a block has
more steps, or ends, and then its blocks are pending and do not wait."""
_MAX_NAMED_STORE_DELAY_S = 0.2
"""The same for a tier that keeps blocks by name. Each call of a store costs messages to its master and memory, so it
gets as many bytes at once as a job may have."""
_MAX_STORE_JOBS = 2
"""Store jobs in flight at one instance and tier: one is copied while the next one is on its way."""
_MAX_BACKLOG = 0.125
"""Share of a pool's blocks that may wait to be stored; they stay pinned. More are not stored."""


@dataclass(slots=True)
class _Offer:
    """Sealed blocks that wait to be stored; their allocation is pinned. ``due``: when they need not wait for others."""

    allocation: KVAllocation
    due: float
    blocks: deque[tuple[bytes, int]] = field(default_factory=deque)


class StoreQueue:
    """Blocks that wait, by instance and tier.

    Args:
        copies: where store jobs go.
    """

    def __init__(self, clock: Clock, copies: Copies) -> None:
        self._clock, self._copies = clock, copies
        self._offers: defaultdict[tuple[InstanceHandle, Tier], deque[_Offer]] = defaultdict(deque)

    def offer(
        self, instance: InstanceHandle, tier: Tier, allocation: KVAllocation, keys: Items[bytes], first: int
    ) -> None:
        """Have blocks wait that were just sealed, from block ``first`` of the table on, where they are absent."""
        absent = [
            (key, allocation.block_ids[index]) for index, key in enumerate(keys, first) if key not in tier.directory
        ]
        if not absent:
            return
        offers = self._offers[instance, tier]
        if sum(len(offer.blocks) for offer in offers) > _MAX_BACKLOG * instance.pool.total_blocks:
            tier.directory.stats.skipped_blocks += len(absent)
            return
        allocation.begin_copy()
        delay_s = _MAX_NAMED_STORE_DELAY_S if tier.info.by_name else _MAX_STORE_DELAY_S
        offers.append(_Offer(allocation, self._clock.now + delay_s, deque(absent)))

    def dispatch(self) -> None:
        """Send offered blocks on their way, as many as may be under way at a time. A tier that rests gets none."""
        for (instance, tier), offers in self._offers.items():
            while offers and tier.rests_until > self._clock.now:
                tier.directory.stats.skipped_blocks += len(offers[0].blocks)
                self._drop(instance, offers.popleft())
            while self._are_due(instance, tier, offers) and self._copies.num_stores(instance, tier) < _MAX_STORE_JOBS:
                if not self._store(instance, tier, offers):
                    break

    def _are_due(self, instance: InstanceHandle, tier: Tier, offers: deque[_Offer]) -> bool:
        """Whether a store job is worth its messages, or its blocks have waited long enough, or others wait for them."""
        if not offers or instance.hello is None:
            return False
        if offers[0].due <= self._clock.now or instance.pool.num_pending_blocks:
            return True
        num_bytes = _MAX_STORE_BYTES if tier.info.by_name else _MIN_STORE_BYTES
        enough = min(num_bytes / instance.hello.block_bytes, _MAX_BACKLOG / 2 * instance.pool.total_blocks)
        return sum(len(offer.blocks) for offer in offers) >= enough

    def _store(self, instance: InstanceHandle, tier: Tier, offers: deque[_Offer]) -> bool:
        """Send one job with blocks that were offered first; False: there is no worker."""
        worker = copying_worker(instance)
        if worker is None or instance.hello is None:
            return False
        block_bytes = instance.hello.block_bytes
        job = Copy(instance, worker, tier, [], [], block_bytes)
        blocks: list[int] = []
        while offers and len(blocks) < max(1, _MAX_STORE_BYTES // block_bytes):
            offer = offers[0]
            key, block = offer.blocks.popleft()
            entry = None if key in tier.directory else tier.directory.begin_store(key)
            if entry is not None:
                job.entries.append(entry)
                blocks.append(block)
                if not job.allocations or job.allocations[-1] is not offer.allocation:
                    offer.allocation.begin_copy()
                    job.allocations.append(offer.allocation)
            elif key not in tier.directory:
                tier.directory.stats.skipped_blocks += 1
            if not offer.blocks:
                offers.popleft()
                self._drop(instance, offer)
        if blocks:
            keys, slots = [entry.key for entry in job.entries], [entry.slot for entry in job.entries]
            job_id = self._copies.begin(job)
            worker.send(
                StoreBlocks(
                    epoch=worker.epoch,
                    job_id=job_id,
                    tier=tier.info.name,
                    keys=keys,
                    slots=slots,
                    block_ids=blocks,
                )
            )
        return True

    def on_memory_lost(self, instance: InstanceHandle) -> None:
        """An instance's pool is gone: what waits there is not stored."""
        for key in [key for key in self._offers if key[0] is instance]:
            for offer in self._offers.pop(key):
                self._drop(instance, offer)

    def _drop(self, instance: InstanceHandle, offer: _Offer) -> None:
        offer.allocation.end_copy()
        instance.wake()
