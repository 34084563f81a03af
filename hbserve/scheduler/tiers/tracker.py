"""KV tiers as the scheduler knows them: their directories, which it owns, and the copies under way.

Blocks are *stored* when they are sealed, not when they are evicted. An eviction then needs no copy, so no admission
ever waits for one, and what is preempted or lost with its instance is in a tier already. Blocks are *loaded* for a
prompt when it is admitted. Its sequence is in no plan until the load has ended or is late.

A copy pins the blocks of its owner until the worker has answered, or its process has ended.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from hbserve.config import Config
from hbserve.kv_cache.tier_directory import TierDirectory, TierEntry
from hbserve.messages.tiers import LoadBlocks, StoreBlocks, TierResult
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.metrics import EventLog
from hbserve.scheduler.sequence import KVAllocation, Sequence
from hbserve.scheduler.tiers.load_plan import choose_load
from hbserve.scheduler.tiers.tier import StoredRun, Tier
from hbserve.scheduler.worker import WorkerHandle

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
_REST_S = 10.0
"""How long a tier that did not answer in time, or failed, is left alone."""
_FORGET = 0.95
"""Factor on the time per byte each time it makes a load not pay, so that a slow moment is not believed for ever."""
_LATE = 2.0
"""Multiple of ``kv_cache.timeout_s`` after which a copy is given up: its worker does so sooner, if it can."""
_NORMAL_FOR_STORES = {"full", "missing"}
"""What a store that evicts on its own does all the time. It is counted and is no event."""
_RATE = 0.3
"""Weight of a load in the mean time per byte."""


@dataclass(eq=False, slots=True)
class KVLoad:
    """The load of a prompt's head, in one job for each run.

    Attributes:
        attempt: of the sequence; a later one does not wait for this load.
        sound: by block of the table: whether it has arrived intact.
        num_jobs: jobs that have not ended.
    """

    sequence: Sequence
    attempt: int
    allocation: KVAllocation
    first_block: int
    sound: list[bool]
    num_jobs: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of the table that are there: those before the load, and the loaded ones up to the first unsound."""
        return self.first_block + next((n for n, is_sound in enumerate(self.sound) if not is_sound), len(self.sound))


@dataclass(eq=False, slots=True)
class _Job:
    """One copy under way. ``load``: None: it stores."""

    instance: InstanceHandle
    worker: WorkerHandle
    tier: Tier
    entries: list[TierEntry]
    allocations: list[KVAllocation]
    block_bytes: int
    load: KVLoad | None = None
    first_block: int = 0
    deadline: float = math.inf
    is_late: bool = False


@dataclass(slots=True)
class _Offer:
    """Sealed blocks that wait to be stored; their allocation is pinned. ``due``: when they need not wait for others."""

    allocation: KVAllocation
    due: float
    blocks: deque[tuple[bytes, int]] = field(default_factory=deque)


class KVTiers:
    """Directories of all tiers, and all copies under way.

    Args:
        compute_s: predicts the time to compute tokens of a prompt after others: ``compute_s(tokens, start)``.
    """

    def __init__(
        self, config: Config, clock: Clock, events: EventLog, compute_s: Callable[[float, float], float]
    ) -> None:
        self._deadline_s = _LATE * config.kv_cache.timeout_s
        self._clock = clock
        self._events = events
        self._compute_s = compute_s
        self._tiers: dict[tuple[str, str], Tier] = {}
        self._tiers_of: dict[InstanceHandle, list[Tier]] = {}
        self._offers: defaultdict[tuple[InstanceHandle, Tier], deque[_Offer]] = defaultdict(deque)
        self._jobs: dict[int, _Job] = {}
        self._last_job_id = 0
        self._next_deadline = math.inf

    def __len__(self) -> int:
        return len(self._jobs)

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
        for job_id in [job_id for job_id, job in self._jobs.items() if job.instance is instance]:
            self._end(self._jobs.pop(job_id), None)
        for key in [key for key in self._offers if key[0] is instance]:
            for offer in self._offers.pop(key):
                self._drop(instance, offer)
        for tier in self._tiers_of.pop(instance, []):
            if tier.info.is_own:
                self._tiers.pop((tier.info.name, tier.info.memory), None)

    def on_worker_ended(self, worker: WorkerHandle) -> list[KVLoad]:
        """A worker copies nothing any more; returns the loads that have ended by that, with what they have."""
        lost = [job_id for job_id, job in self._jobs.items() if job.worker is worker]
        loads = [self._end(self._jobs.pop(job_id), None) for job_id in lost]
        return [load for load in loads if load is not None]

    def has_jobs(self, worker: WorkerHandle) -> bool:
        """Whether copies of a worker are under way."""
        return any(job.worker is worker for job in self._jobs.values())

    def _worker(self, instance: InstanceHandle) -> WorkerHandle | None:
        """Return a worker that copies for an instance; all have the same memory."""
        able = [worker for worker in instance.workers.values() if worker.can_take_plans]
        return min(able, key=lambda worker: (worker.is_draining, not worker.role.prefills), default=None)

    def _usable(self, instance: InstanceHandle) -> list[Tier]:
        now = self._clock.now
        return [tier for tier in self._tiers_of.get(instance, ()) if tier.rests_until <= now]

    def to_ask(self, instance: InstanceHandle) -> list[tuple[Tier, WorkerHandle]]:
        """Return the tiers of an instance that may hold more than their directories know, each with a worker."""
        worker = self._worker(instance)
        return [] if worker is None else [(tier, worker) for tier in self._usable(instance) if tier.info.by_name]

    def rest(self, tier: Tier, kind: str, number: int) -> None:
        """Leave a tier alone for a while, because it has failed."""
        failures = tier.directory.stats.failures
        failures[kind] = failures.get(kind, 0) + number
        tier.rests_until = self._clock.now + _REST_S

    # --- storing ---------------------------------------------------------------------------------

    def offer(self, instance: InstanceHandle, allocation: KVAllocation, keys: Items[bytes], first: int) -> None:
        """Store blocks that were just sealed, from block ``first`` of the allocation's table on, where they are absent.

        They leave with the next `dispatch`.
        """
        for tier in self._usable(instance):
            absent = [
                (key, allocation.block_ids[index]) for index, key in enumerate(keys, first) if key not in tier.directory
            ]
            if not absent:
                continue
            offers = self._offers[instance, tier]
            if sum(len(offer.blocks) for offer in offers) > _MAX_BACKLOG * instance.pool.total_blocks:
                tier.directory.stats.skipped_blocks += len(absent)
                continue
            allocation.begin_copy()
            delay_s = _MAX_NAMED_STORE_DELAY_S if tier.info.by_name else _MAX_STORE_DELAY_S
            offers.append(_Offer(allocation, self._clock.now + delay_s, deque(absent)))

    def dispatch(self) -> None:
        """Send offered blocks on their way, as many as may be under way at a time. A tier that rests gets none."""
        for (instance, tier), offers in self._offers.items():
            while offers and tier.rests_until > self._clock.now:
                tier.directory.stats.skipped_blocks += len(offers[0].blocks)
                self._drop(instance, offers.popleft())
            while self._are_due(instance, tier, offers) and self._num_stores(instance, tier) < _MAX_STORE_JOBS:
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

    def _num_stores(self, instance: InstanceHandle, tier: Tier) -> int:
        jobs = self._jobs.values()
        return sum(job.instance is instance and job.tier is tier and job.load is None for job in jobs)

    def _store(self, instance: InstanceHandle, tier: Tier, offers: deque[_Offer]) -> bool:
        """Send one job with blocks that were offered first; False: there is no worker."""
        worker = self._worker(instance)
        if worker is None or instance.hello is None:
            return False
        block_bytes = instance.hello.block_bytes
        job = _Job(instance, worker, tier, [], [], block_bytes)
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
            job_id = self._begin(job)
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

    def _drop(self, instance: InstanceHandle, offer: _Offer) -> None:
        offer.allocation.end_copy()
        instance.wake()

    # --- loading ---------------------------------------------------------------------------------

    def find(self, instance: InstanceHandle, keys: Items[bytes], first: int) -> list[StoredRun]:
        """Find blocks that follow block ``first`` of a prompt in tiers, in runs, and choose which to load.

        The chosen runs may begin later than ``first``: what is before them is to be computed meanwhile, see
        `choose_load`.

        Args:
            keys: of the whole prompt.
        """
        tiers = self._usable(instance) if self._worker(instance) is not None else []
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

    def begin_load(
        self, instance: InstanceHandle, sequence: Sequence, allocation: KVAllocation, runs: list[StoredRun]
    ) -> None:
        """Load runs into the blocks of an allocation, which is in no plan until `on_result` returns its load."""
        worker = self._worker(instance)
        assert worker is not None, "an instance that is ready has a worker"
        assert instance.hello is not None
        first = runs[0].first
        load = KVLoad(
            sequence, sequence.attempt, allocation, first, [False] * sum(len(run.entries) for run in runs), len(runs)
        )
        for run in runs:
            tier, entries = run.tier, run.entries
            for entry in entries:
                tier.directory.begin_load(entry)
            tier.directory.touch(entry.key for entry in reversed(entries))
            allocation.begin_copy()
            job = _Job(instance, worker, tier, entries, [allocation], instance.hello.block_bytes, load, run.first)
            tier.loading_bytes += len(entries) * job.block_bytes
            job_id = self._begin(job)
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

    def _begin(self, job: _Job) -> int:
        self._last_job_id += 1
        job.deadline = self._clock.now + self._deadline_s
        self._jobs[self._last_job_id] = job
        self._next_deadline = min(self._next_deadline, job.deadline)
        self._clock.call_at(job.deadline)
        return self._last_job_id

    def on_result(self, worker: WorkerHandle, result: TierResult) -> KVLoad | None:
        """A worker has ended a copy; returns the load that has ended by that, unless it is late."""
        job = self._jobs.get(result.job_id)
        if job is None or job.worker is not worker:
            return None
        del self._jobs[result.job_id]
        if result.failures and not job.is_late:
            self._note_failures(job, result)
        return self._end(job, result)

    def _note_failures(self, job: _Job, result: TierResult) -> None:
        kinds = set(result.failures.values())
        if job.tier.info.by_name and kinds <= _NORMAL_FOR_STORES:
            return
        what = "loaded" if job.load is not None else "stored"
        text = f"{len(result.failures)} of {len(job.entries)} blocks were not {what} ({', '.join(sorted(kinds))})"
        self._events.note("tier_failed", _subject(job), f"{text}: {result.error}")
        if kinds & {"timeout", "backend"}:
            job.tier.rests_until = self._clock.now + _REST_S

    def _end(self, job: _Job, result: TierResult | None) -> KVLoad | None:
        """A copy has ended: drop its pins. ``result``: None: its worker has ended."""
        tier, stats, load = job.tier, job.tier.directory.stats, job.load
        failures = dict.fromkeys(range(len(job.entries)), "lost") if result is None else result.failures
        for kind in failures.values():
            stats.failures[kind] = stats.failures.get(kind, 0) + 1
        num_sound = len(job.entries) - len(failures)
        num_bytes = num_sound * job.block_bytes
        for index, entry in enumerate(job.entries):
            failure = failures.get(index)
            if load is None:
                checksums = None if result is None or failure is not None else result.checksums[index]
                tier.directory.end_store(entry, checksums)
            else:
                tier.directory.end_load(entry, failure in (None, "lost"))
                load.sound[job.first_block - load.first_block + index] = failure is None
        if load is not None:
            tier.loading_bytes -= len(job.entries) * job.block_bytes
        if result is not None and load is None:
            stats.stored_blocks, stats.stored_bytes = stats.stored_blocks + num_sound, stats.stored_bytes + num_bytes
            stats.store_s += result.seconds
        elif result is not None:
            stats.loaded_blocks, stats.loaded_bytes = stats.loaded_blocks + num_sound, stats.loaded_bytes + num_bytes
            stats.load_s += result.seconds
            if num_bytes:
                rate = result.seconds / num_bytes
                tier.s_per_byte += (_RATE if tier.s_per_byte else 1.0) * (rate - tier.s_per_byte)
        for allocation in job.allocations:
            allocation.end_copy()
        job.instance.wake()
        if load is None:
            return None
        load.num_jobs -= 1
        if load.num_jobs or job.is_late:
            return None
        stats.saved_prompt_tokens += (load.num_blocks - load.first_block) * load.allocation.pool.block_size
        return load

    def expire(self) -> list[KVLoad]:
        """Give up on copies that are late; returns loads of which one is.

        The blocks of a late copy stay pinned until its worker answers or ends. What it stored, or was to load, is
        forgotten, and its tier rests.
        """
        now = self._clock.now
        if now < self._next_deadline:
            return []
        late = [job for job in self._jobs.values() if job.deadline <= now and not job.is_late]
        loads: dict[int, KVLoad] = {}
        for job in late:
            job.is_late = True
            what = f"a copy of {len(job.entries)} blocks has not ended within {self._deadline_s:g} s"
            self._events.note("tier_failed", _subject(job), what)
            self.rest(job.tier, "late", len(job.entries))
            for entry in job.entries:
                job.tier.directory.forget(entry)
            if job.load is not None:
                loads[id(job.load)] = job.load
        self._next_deadline = min((job.deadline for job in self._jobs.values() if not job.is_late), default=math.inf)
        for job in self._jobs.values():
            if job.load is not None and id(job.load) in loads:
                job.is_late = True  # nothing waits for the other runs of the load either
        return list(loads.values())

    # --- for tests and debugging -----------------------------------------------------------------

    def check_consistency(self) -> None:
        """Assert that the directories agree with the copies under way."""
        for tier in self._tiers.values():
            jobs = [entry for job in self._jobs.values() if job.tier is tier for entry in job.entries]
            tier.directory.check_consistency(jobs)
            assert tier.loading_bytes == sum(
                len(job.entries) * job.block_bytes for job in self._jobs.values() if job.tier is tier and job.load
            )


def _subject(job: _Job) -> str:
    return f"KV tier {job.tier.info.name} of {job.instance.id}"
