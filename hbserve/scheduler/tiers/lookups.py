"""Lookups of new prompts in tiers that may hold blocks of other systems, or of this one before it was started again.

A new request is not admitted before its lookup has been answered or takes too long. It is an ordinary waiting request
meanwhile, with a time from which it may be admitted (`Sequence.retry_at`), so it is overtaken and aborted like others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from hbserve.messages.tiers import FindBlocks, FoundBlocks
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.metrics import EventLog
from hbserve.scheduler.sequence import Phase, Sequence
from hbserve.scheduler.tiers.tier import Tier
from hbserve.scheduler.tiers.tracker import KVTiers
from hbserve.scheduler.worker import WorkerHandle

_MAX_WAIT_S = 1.0
"""A lookup has failed after this time, or ``kv_cache.timeout_s`` if that is less. A store answers in milliseconds."""
_PATIENCE, _MIN_PATIENCE_S = 0.25, 0.005
"""A request waits for its lookup up to this share of the predicted time to compute the blocks, and at least these
seconds. A slow store must not cost more than it can save. An answer that comes later serves other requests."""


@dataclass(eq=False, slots=True)
class _Lookup:
    """A lookup without an answer. ``keys``: of the prompt's blocks, from the first on that nothing here has."""

    sequence: Sequence
    tier: Tier
    worker: WorkerHandle
    keys: list[bytes]
    deadline: float


class TierLookups:
    """All lookups under way.

    Args:
        timeout_s: after which a copy has failed.
    """

    def __init__(self, timeout_s: float, clock: Clock, events: EventLog, tiers: KVTiers) -> None:
        self._wait_s = min(_MAX_WAIT_S, timeout_s)
        self._clock, self._events, self._tiers = clock, events, tiers
        self._open: dict[int, _Lookup] = {}
        self._last_id = 0
        self._next_deadline = math.inf

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, sequence: Sequence, instances: Iterable[InstanceHandle]) -> None:
        """Look a new request up, and have it wait for the answer, unless an instance knows where all of its blocks are.

        Of the instances that share a tier and compute prompts, the one that knows most of the prompt asks.
        """
        best: dict[int, tuple[int, InstanceHandle, Tier, WorkerHandle]] = {}
        for instance in instances:
            tiers = self._tiers.to_ask(instance) if instance.role.prefills else []
            num_known = self._tiers.count_known(instance, _keys(sequence, instance)) if tiers else 0
            for tier, worker in tiers:
                if id(tier) not in best or best[id(tier)][0] < num_known:
                    best[id(tier)] = num_known, instance, tier, worker
        for num_known, instance, tier, worker in best.values():
            keys = _keys(sequence, instance)
            if num_known < len(keys):
                compute_s = self._tiers.compute_s(instance, num_known, len(keys))
                self._ask(sequence, tier, worker, keys[num_known:], compute_s)

    def _ask(self, sequence: Sequence, tier: Tier, worker: WorkerHandle, keys: list[bytes], compute_s: float) -> None:
        """Ask a tier. ``compute_s``: the predicted time to compute the blocks; 0: it is not known."""
        self._last_id += 1
        patience_s = max(_MIN_PATIENCE_S, _PATIENCE * compute_s) if compute_s else math.inf
        deadline = self._clock.now + self._wait_s
        sequence.retry_at = max(sequence.retry_at, min(deadline, self._clock.now + patience_s))
        self._clock.call_at(sequence.retry_at)
        self._open[self._last_id] = _Lookup(sequence, tier, worker, keys, deadline)
        self._next_deadline = min(self._next_deadline, deadline)
        self._clock.call_at(deadline)
        worker.send(FindBlocks(epoch=worker.epoch, lookup_id=self._last_id, tier=tier.info.name, keys=keys))

    def on_found(self, worker: WorkerHandle, found: FoundBlocks) -> None:
        """A tier has answered: its directory learns what it has."""
        lookup = self._open.get(found.lookup_id)
        if lookup is None or lookup.worker is not worker:
            return
        if found.error is not None:
            self._fail(lookup, found.error)
        else:
            lookup.tier.directory.add_found(lookup.keys[: found.num_found])
        self._end(found.lookup_id)

    def on_worker_ended(self, worker: WorkerHandle) -> None:
        """A worker answers nothing any more."""
        for lookup_id in [lookup_id for lookup_id, lookup in self._open.items() if lookup.worker is worker]:
            self._end(lookup_id)

    def expire(self) -> None:
        """Give up lookups that are late. Their tiers rest."""
        now = self._clock.now
        if now < self._next_deadline:
            return
        for lookup_id in [lookup_id for lookup_id, lookup in self._open.items() if lookup.deadline <= now]:
            self._fail(self._open[lookup_id], f"a lookup has not ended within {self._wait_s:g} s")
            self._end(lookup_id)
        self._next_deadline = min((lookup.deadline for lookup in self._open.values()), default=math.inf)

    def _fail(self, lookup: _Lookup, error: str) -> None:
        tier = lookup.tier
        if tier.rests_until <= self._clock.now:  # else another lookup has said so
            self._events.note("tier_failed", f"KV tier {tier.info.name}", error)
        tier.rest(self._clock.now)
        tier.directory.stats.count_failures("lookup")

    def _end(self, lookup_id: int) -> None:
        sequence = self._open.pop(lookup_id).sequence
        if any(lookup.sequence is sequence for lookup in self._open.values()):
            return
        if sequence.phase is Phase.WAITING and not sequence.attempt:
            sequence.retry_at = self._clock.now


def _keys(sequence: Sequence, instance: InstanceHandle) -> list[bytes]:
    """Return the prefix hashes of the blocks of a prompt that need not be computed."""
    block_size = instance.pool.block_size
    return sequence.hashes(block_size)[: (len(sequence.tokens) - 1) // block_size]
