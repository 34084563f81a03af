"""KV tiers as the scheduler knows them: their directories, which it owns, and what is stored and loaded.

Blocks are *stored* when they are sealed, not when they are evicted. An eviction then needs no copy, so no admission
ever waits for one, and what is preempted or lost with its instance is in a tier already. Blocks are *loaded* for a
prompt when it is admitted. Its sequence is in no plan until the load has ended or is late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

from hbserve.config import Config
from hbserve.kv_cache.tier_directory import TierDirectory, TierEntry
from hbserve.messages.tiers import LoadBlocks, TierResult
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.metrics import EventLog
from hbserve.scheduler.sequence import KVAllocation, Sequence
from hbserve.scheduler.tiers.copies import Copies, Copy, KVLoad, copying_worker
from hbserve.scheduler.tiers.load_plan import choose_load
from hbserve.scheduler.tiers.store_queue import StoreQueue
from hbserve.scheduler.tiers.tier import StoredRun, Tier
from hbserve.scheduler.worker import WorkerHandle

_FORGET = 0.95
"""Factor on the time per byte each time it makes a load not pay, so that a slow moment is not believed for ever."""
_PATIENCE, _MIN_PATIENCE_S = 4.0, 1.0
"""The scheduler gives a load up after this multiple of the predicted time to compute the same blocks, and not before
these seconds. A request loses about this much time to a tier that hangs."""


class KVTiers:
    """Directories of all tiers, and all copies under way.

    Args:
        compute_s: predicts the time to compute tokens of a prompt after others: ``compute_s(tokens, start)``.
    """

    def __init__(
        self, config: Config, clock: Clock, events: EventLog, compute_s: Callable[[float, float], float]
    ) -> None:
        self._clock = clock
        self._compute_s = compute_s
        self._tiers: dict[tuple[str, str], Tier] = {}
        self._tiers_of: dict[InstanceHandle, list[Tier]] = {}
        self._copies = Copies(config.kv_cache.timeout_s, clock, events)
        self._stores = StoreQueue(clock, self._copies)

    def __len__(self) -> int:
        return len(self._copies)

    @property
    def directories(self) -> Iterable[TierDirectory]:
        """Return the directories of all tiers; statistics read them."""
        return [tier.directory for tier in self._tiers.values()]

    # --- instances -------------------------------------------------------------------------------

    def on_registered(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        """A worker has introduced itself, and names its tiers."""
        assert worker.hello is not None
        tiers = []
        for info in worker.hello.tiers:
            key = info.name, info.memory
            if key not in self._tiers:
                directory = TierDirectory(info.name, info.num_slots)
                directory.adopt(info.kept)
                self._tiers[key] = Tier(info, directory)
            tiers.append(self._tiers[key])
        self._tiers_of[instance] = tiers

    def on_memory_lost(self, instance: InstanceHandle) -> None:
        """An instance's pool is gone, with all copies from and to it; tiers that other processes hold stay."""
        self._copies.on_memory_lost(instance)
        self._stores.on_memory_lost(instance)
        for tier in self._tiers_of.pop(instance, []):
            if tier.info.is_own:
                self._tiers.pop((tier.info.name, tier.info.memory), None)

    def _usable(self, instance: InstanceHandle) -> list[Tier]:
        now = self._clock.now
        return [tier for tier in self._tiers_of.get(instance, ()) if tier.rests_until <= now]

    def to_ask(self, instance: InstanceHandle) -> list[tuple[Tier, WorkerHandle]]:
        """Return the tiers of an instance that may hold more than their directories know, each with a worker."""
        worker = copying_worker(instance)
        return [] if worker is None else [(tier, worker) for tier in self._usable(instance) if tier.info.by_name]

    def count_known(self, instance: InstanceHandle, keys: Items[bytes]) -> int:
        """Count the blocks of a prompt, from the first on, that an instance's pool or its tiers are known to hold."""
        number, directories = (
            instance.pool.count_cached_prefix(keys),
            [tier.directory for tier in self._usable(instance)],
        )
        while number < len(keys) and any(keys[number] in directory for directory in directories):
            number += 1
        return number

    def compute_s(self, instance: InstanceHandle, first: int, end: int) -> float:
        """Predict the time to compute blocks of a prompt; 0: it is not known."""
        block_size = instance.pool.block_size
        return self._compute_s((end - first) * block_size, first * block_size)

    # --- storing ---------------------------------------------------------------------------------

    def offer(self, instance: InstanceHandle, keys: Items[bytes]) -> None:
        """Store contents that were just sealed, where they are absent. They leave with a later `dispatch`."""
        for tier in self._usable(instance):
            self._stores.offer(instance, tier, keys)

    def dispatch(self) -> None:
        """Send offered blocks on their way, as many as may be under way at a time."""
        self._stores.dispatch()

    # --- loading ---------------------------------------------------------------------------------

    def find(self, instance: InstanceHandle, keys: Items[bytes], first: int) -> list[StoredRun]:
        """Find blocks that follow block ``first`` of a prompt in tiers, in runs, and choose which to load.

        The chosen runs may begin later than ``first``: what is before them is to be computed meanwhile, see
        `choose_load`.

        Args:
            keys: of the whole prompt.
        """
        tiers = self._usable(instance) if copying_worker(instance) is not None else []
        runs: list[StoredRun] = []
        index, end = first, len(keys)
        while index < end:
            for number, tier in enumerate(tiers):
                entries: list[TierEntry] = []
                faster = [other.directory for other in tiers[:number]]
                while index < end and (entry := tier.directory.get(keys[index])) is not None:
                    if faster and any(directory.get(keys[index]) for directory in faster):
                        break
                    entries.append(entry)
                    index += 1
                if entries:
                    runs.append(StoredRun(tier, index - len(entries), entries))
                    break
            else:
                break
        if not runs:
            return runs
        assert instance.hello is not None
        block_bytes = instance.hello.block_bytes

        def load_s(tier: Tier, num_blocks: int) -> float:
            stats = tier.directory.stats
            s_per_byte = tier.s_per_byte or (stats.store_s / stats.stored_bytes if stats.stored_bytes else 0.0)
            return s_per_byte * (tier.loading_bytes + num_blocks * block_bytes)

        is_idle = not instance.num_sequences
        chosen = choose_load(runs, instance.pool.block_size, self._compute_s, load_s, is_idle)
        for tier in {run.tier for run in runs} - {run.tier for run in chosen}:
            tier.s_per_byte *= _FORGET
        return chosen

    def begin_load(self, instance: InstanceHandle, sequence: Sequence, allocation: KVAllocation) -> None:
        """Load what is planned into the blocks of an allocation, until `on_result` returns the load."""
        runs, allocation.stored_runs = allocation.stored_runs, []
        if not runs:
            return
        allocation.num_loads += 1
        worker = copying_worker(instance)
        assert worker is not None, "an instance that is ready has a worker"
        assert instance.hello is not None
        first = runs[0].first
        compute_s = self.compute_s(instance, first, runs[-1].end)
        patience_s = max(_MIN_PATIENCE_S, _PATIENCE * compute_s) if compute_s else math.inf
        load = KVLoad(
            sequence, sequence.attempt, allocation, first, [False] * sum(len(run.entries) for run in runs), len(runs)
        )
        for run in runs:
            tier, entries = run.tier, run.entries
            for entry in entries:
                tier.directory.begin_load(entry)
            tier.directory.touch(entry.key for entry in reversed(entries))
            allocation.begin_copy()
            job = Copy(instance, worker, tier, entries, allocation, instance.hello.block_bytes, load, run.first)
            tier.loading_bytes += len(entries) * job.block_bytes
            job_id = self._copies.begin(job, patience_s)
            worker.send(
                LoadBlocks(
                    epoch=worker.epoch,
                    job_id=job_id,
                    tier=tier.info.name,
                    keys=[entry.key for entry in entries],
                    slots=[entry.slot for entry in entries],
                    block_ids=allocation.block_ids[run.first : run.first + len(entries)],
                    checksums=[entry.checksums or [] for entry in entries],
                )
            )

    def touch(self, instance: InstanceHandle, keys: Items[bytes]) -> None:
        """Note that contents were used; the end of a prompt is evicted before its beginning."""
        for tier in self._tiers_of.get(instance, ()):
            tier.directory.touch(reversed(keys))

    # --- ends ------------------------------------------------------------------------------------

    def has_jobs(self, worker: WorkerHandle) -> bool:
        """Whether copies of a worker are under way."""
        return self._copies.has(worker)

    def on_result(self, worker: WorkerHandle, result: TierResult) -> KVLoad | None:
        """A worker has ended a copy; returns the load that has ended by that, unless it is late."""
        return self._copies.on_result(worker, result)

    def on_worker_ended(self, worker: WorkerHandle) -> list[KVLoad]:
        """A worker copies nothing any more; returns the loads that have ended by that, with what they have."""
        return self._copies.on_worker_ended(worker)

    def expire(self) -> list[KVLoad]:
        """Give up on copies that are late; returns loads of which one is."""
        return self._copies.expire()

    def check_consistency(self) -> None:
        """Assert that the directories agree with the copies under way; for tests and debugging."""
        self._copies.check_consistency(list(self._tiers.values()))
