"""Copies between instances and KV tiers, from their beginning to their end.

A load pins the blocks of its sequence, and a store shares those that it copies, until the worker has answered, or its
process has ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

from hbserve.kv_cache.block_pool import BlockPool
from hbserve.kv_cache.tier_directory import TierEntry
from hbserve.messages.tiers import TierResult
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.metrics import EventLog
from hbserve.scheduler.sequence import KVAllocation, Sequence
from hbserve.scheduler.tiers.tier import Tier
from hbserve.scheduler.worker import WorkerHandle

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


@dataclass(frozen=True, slots=True)
class HeldBlocks:
    """Sealed blocks that a store job copies; requests may own them, too, or have ended."""

    pool: BlockPool
    holder: str

    def end_copy(self) -> None:
        """Let them go: the copy can touch them no more."""
        self.pool.let_go(self.holder)


@dataclass(eq=False, slots=True)
class Copy:
    """One copy under way. ``load``: None: it stores."""

    instance: InstanceHandle
    worker: WorkerHandle
    tier: Tier
    entries: list[TierEntry]
    blocks: KVAllocation | HeldBlocks
    block_bytes: int
    load: KVLoad | None = None
    first_block: int = 0
    patience_s: float = math.inf
    deadline: float = math.inf
    is_late: bool = False


def copying_worker(instance: InstanceHandle) -> WorkerHandle | None:
    """Return a worker that copies for an instance; all have the same memory."""
    able = [worker for worker in instance.workers.values() if worker.can_take_plans]
    return min(able, key=lambda worker: (worker.is_draining, not worker.role.prefills), default=None)


class Copies:
    """All copies under way.

    Args:
        timeout_s: ``kv_cache.timeout_s``.
    """

    def __init__(self, timeout_s: float, clock: Clock, events: EventLog) -> None:
        self._deadline_s = _LATE * timeout_s
        self._clock, self._events = clock, events
        self._jobs: dict[int, Copy] = {}
        self._last_job_id = 0
        self._next_deadline = math.inf

    def __len__(self) -> int:
        return len(self._jobs)

    def num_stores(self, instance: InstanceHandle, tier: Tier) -> int:
        """Count the copies from an instance to a tier."""
        jobs = self._jobs.values()
        return sum(job.instance is instance and job.tier is tier and job.load is None for job in jobs)

    def has(self, worker: WorkerHandle) -> bool:
        """Whether copies of a worker are under way."""
        return any(job.worker is worker for job in self._jobs.values())

    def on_memory_lost(self, instance: InstanceHandle) -> None:
        """An instance's pool is gone, with all copies from and to it."""
        for job_id in [job_id for job_id, job in self._jobs.items() if job.instance is instance]:
            self._end(self._jobs.pop(job_id), None)

    def on_worker_ended(self, worker: WorkerHandle) -> list[KVLoad]:
        """A worker copies nothing any more; returns the loads that have ended by that, with what they have."""
        lost = [job_id for job_id, job in self._jobs.items() if job.worker is worker]
        loads = [self._end(self._jobs.pop(job_id), None) for job_id in lost]
        return [load for load in loads if load is not None]

    def begin(self, job: Copy, patience_s: float = math.inf) -> int:
        """A copy is on its way to its worker; returns its number.

        Args:
            patience_s: it is late after this time; at most `_LATE` times the configured one.
        """
        self._last_job_id += 1
        job.patience_s = min(patience_s, self._deadline_s)
        job.deadline = self._clock.now + job.patience_s
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

    def _note_failures(self, job: Copy, result: TierResult) -> None:
        kinds = set(result.failures.values())
        if job.tier.info.by_name and kinds <= _NORMAL_FOR_STORES:
            return
        what = "loaded" if job.load is not None else "stored"
        text = f"{len(result.failures)} of {len(job.entries)} blocks were not {what} ({', '.join(sorted(kinds))})"
        self._events.note("tier_failed", _subject(job), f"{text}: {result.error}")
        if kinds & {"timeout", "backend"}:
            job.tier.rest(self._clock.now)

    def _end(self, job: Copy, result: TierResult | None) -> KVLoad | None:
        """A copy has ended: drop its pins. ``result``: None: its worker has ended."""
        tier, stats, load = job.tier, job.tier.directory.stats, job.load
        failures = dict.fromkeys(range(len(job.entries)), "lost") if result is None else result.failures
        for kind in failures.values():
            stats.count_failures(kind)
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
        job.blocks.end_copy()
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
            what = f"a copy of {len(job.entries)} blocks has not ended within {job.patience_s:.3g} s"
            self._events.note("tier_failed", _subject(job), what)
            job.tier.rest(now)
            job.tier.directory.stats.count_failures("late", len(job.entries))
            for entry in job.entries:
                job.tier.directory.forget(entry)
            if job.load is not None:
                loads[id(job.load)] = job.load
        self._next_deadline = min((job.deadline for job in self._jobs.values() if not job.is_late), default=math.inf)
        for job in self._jobs.values():
            if job.load is not None and id(job.load) in loads:
                job.is_late = True  # nothing waits for the other runs of the load either
        return list(loads.values())

    def check_consistency(self, tiers: Items[Tier]) -> None:
        """Assert that the directories agree with the copies; for tests and debugging."""
        for tier in tiers:
            jobs = [entry for job in self._jobs.values() if job.tier is tier for entry in job.entries]
            tier.directory.check_consistency(jobs)
            assert tier.loading_bytes == sum(
                len(job.entries) * job.block_bytes for job in self._jobs.values() if job.tier is tier and job.load
            )


def _subject(job: Copy) -> str:
    return f"KV tier {job.tier.info.name} of {job.instance.id}"
