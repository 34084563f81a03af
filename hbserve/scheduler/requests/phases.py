"""Every open request: its phase, its memory, its way back to waiting and its end.

`RequestPhases` alone changes a request's phase (diagram and table in `hbserve.scheduler.sequence`), and frees its
allocations. `StepResults` adds what each step brings, and `RequestLifecycle`, which is the one that others use, adds
admission, copies, transfers and losses.

The path of memory: `_enter` decides that an allocation goes, and is the only caller of `free_allocation`::

    _enter ──► free_allocation ──► BlockPool.free ──► BlockPool._free_now
                                     └ pinned by a step or a transfer: KVAllocation.end_row or
                                       end_transfer ──► BlockPool.unpin ──► BlockPool._free_now
"""

from __future__ import annotations

import logging
from collections import defaultdict

from hbserve.config import Config
from hbserve.messages.client import RequestOutput
from hbserve.policy.profile_curves import ProfileCurves
from hbserve.policy.queue_policy import QueuePolicy
from hbserve.scheduler.core_io import Clock, OutboxWriter
from hbserve.scheduler.instance import Instances
from hbserve.scheduler.metrics import EventLog, SchedulerMetrics
from hbserve.scheduler.queue.admission import Admission
from hbserve.scheduler.queue.waiting_queue import WaitingQueue
from hbserve.scheduler.sequence import KVAllocation, Phase, Sequence
from hbserve.scheduler.tiers.lookups import TierLookups
from hbserve.scheduler.tiers.tracker import KVTiers
from hbserve.scheduler.transfer import Transfer
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.speculation import Speculation

logger = logging.getLogger(__name__)

_RETRY_DELAY_S = 0.1
_MAX_RETRY_DELAY_S = 5.0


class RequestPhases:
    """All open requests, and every change of their phases. Base of `RequestLifecycle`.

    Args:
        instances: by id; an instance that has left is not in it.
        transfers: bring KV from one allocation to the other.
        events: told of transfers that failed.

    Attributes:
        counts: of what has happened since the start, by name.
        tiers: KV outside the instances' memory.
    """

    def __init__(
        self,
        config: Config,
        instances: Instances,
        transfers: TransferTracker,
        metrics: SchedulerMetrics,
        events: EventLog,
        clock: Clock,
        outbox: OutboxWriter,
        curves: ProfileCurves | None = None,
    ) -> None:
        self.counts: defaultdict[str, int] = defaultdict(int)
        self._sequences: dict[tuple[bytes, str], Sequence] = {}
        self._instances = instances
        self._transfers = transfers
        self._metrics = metrics
        self._events = events
        self._clock = clock
        self._outbox = outbox
        self._queue = WaitingQueue(config, curves)
        self.tiers = KVTiers(config, clock, events, self._queue.prompt_s)
        self._lookups = TierLookups(config.kv_cache.timeout_s, clock, events, self.tiers)
        self._admission = Admission(instances, config, clock, self._queue.policy, transfers.is_open, self.tiers)
        self._speculation = Speculation(config.speculation)
        self._max_attempts = config.kv_transfer.max_attempts
        self._shares_prefixes = config.performance.enable_prefix_caching

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def waiting(self) -> list[Sequence]:
        """Requests that are not yet admitted, in the order of the policy."""
        return self._queue.waiting

    @property
    def policy(self) -> QueuePolicy:
        """The rule that says which prompt goes first."""
        return self._queue.policy

    def get(self, client: bytes, request_id: str) -> Sequence | None:
        """Return a client's open request."""
        return self._sequences.get((client, request_id))

    def _enter(self, sequence: Sequence, phase: Phase) -> None:
        """Change a request's phase, and free the memory that it does not hold in the new one.

        A request that waits or is finished holds none. One whose KV is transferred holds its decode allocation. An end
        may come while the blocks are still read or written: in the middle of `on_step_done`, with later steps,
        transfers and copies of tiers under way. Each has a pin, so no block gets new contents before the last one ends.
        """
        sequence.enter(phase)
        if phase not in (Phase.WAITING, Phase.PREFILLING):
            sequence.alike = None
        if phase is Phase.PREFILLING or phase is Phase.DECODING:
            return
        kept = sequence.decode_allocation if phase is Phase.TRANSFERRING else None
        for allocation in sequence.allocations:
            if allocation is not kept:
                self.free_allocation(sequence, allocation)
                instance = self._instances.get(allocation.instance_id)
                if instance is not None:
                    self.tiers.touch(instance, sequence.block_hashes)
        sequence.prefill_allocation, sequence.decode_allocation = None, kept

    def free_allocation(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """Free a slot and its blocks; the pool frees pinned blocks when the last pin is dropped."""
        logger.debug(
            "request %s: freed %d blocks of %s", sequence.id, len(allocation.block_ids), allocation.instance_id
        )
        instance = self._instances.get(allocation.instance_id)
        if instance is not None:  # or its memory is gone
            instance.free_slot(sequence, allocation)
        allocation.pool.free(allocation.owner)

    # --- waiting -------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Have a new request wait."""
        self._sequences[sequence.client, sequence.id] = sequence
        has_eagle_head = any(instance.has_eagle_head for instance in self._instances.values())
        sequence.speculator = self._speculation.begin(sequence.request, has_eagle_head)
        if not self.waiting:
            self._queue.on_first_waiting(self._clock.now)
            self._admission.is_full = False
        self._wait(sequence)
        self._metrics.on_arrived(sequence)
        self._lookups.begin(sequence, self._instances.ready)
        logger.debug("request %s: taken, %d prompt tokens", sequence.id, sequence.num_prompt_tokens)

    def _wait(self, sequence: Sequence) -> None:
        sequence.expected_cached_tokens = self._admission.count_cached_tokens(sequence)
        sequence.alike, sequence.num_alike_tokens = self._admission.find_alike(sequence)
        self._queue.insert(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Put a request back to waiting, because an older one needs its blocks."""
        logger.debug("request %s: preempted at %d tokens", sequence.id, len(sequence.tokens))
        self.counts["preemptions"] += 1
        self._metrics.on_preempted(sequence)
        self._put_back(sequence)

    def _retry_all(self, failed: list[Transfer], reason: str) -> None:
        for transfer in failed:
            if transfer.attempt == transfer.sequence.attempt and transfer.sequence.phase is not Phase.FINISHED:
                self._retry(transfer.sequence, reason)

    def _retry(self, sequence: Sequence, reason: str) -> None:
        """Compute again after an attempt that failed through no fault of the request, but not for ever."""
        sequence.num_failures += 1
        sequence.num_tokens_at_failure = len(sequence.tokens)
        if sequence.num_failures >= self._max_attempts:
            self._give_up(sequence, f"gave up after {sequence.num_failures} attempts; the last: {reason}")
            return
        self._put_back(sequence)
        self._count_retry(sequence, reason)
        # Not at once: what made it fail may take a moment to be noticed.
        delay_s = min(_RETRY_DELAY_S * 2 ** (sequence.num_failures - 1), _MAX_RETRY_DELAY_S)
        sequence.retry_at = self._clock.now + delay_s
        self._clock.call_at(sequence.retry_at)

    def _count_retry(self, sequence: Sequence, reason: str) -> None:
        logger.debug("request %s: retried, attempt %d: %s", sequence.id, sequence.attempt + 1, reason)
        self.counts["retries"] += 1
        self._metrics.on_retried(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        """Have a request wait again, with all its tokens; its results in flight become void."""
        self._enter(sequence, Phase.WAITING)
        sequence.attempt += 1
        sequence.num_blocks_dispatched = 0
        sequence.open_transfers.clear()
        self._wait(sequence)

    # --- ends ----------------------------------------------------------------------------------------

    def finish(
        self,
        sequence: Sequence,
        reason: str,
        error: str | None = None,
        error_kind: str = "RequestFailedError",
        error_param: str | None = None,
    ) -> None:
        """End a request for another reason than its tokens, and tell its client."""
        self._close(sequence, {"abort": "aborted", "error": "failed"}.get(reason, "completed"), error or reason)
        self._outbox.push(
            sequence.client,
            RequestOutput(
                request_id=sequence.id,
                token_ids=[],
                finish_reason=reason,
                error=error,
                error_kind=None if error is None else error_kind,
                error_param=error_param,
            ),
        )

    def fail(self, sequence: Sequence, error: str) -> None:
        """End a request that cannot be answered."""
        self.finish(sequence, "error", error)

    def _give_up(self, sequence: Sequence, error: str) -> None:
        """End a request that has failed too often."""
        self._events.note("given_up", f"request {sequence.id}", error)
        self.fail(sequence, error)

    def abort_all_of(self, client: bytes) -> None:
        """End all requests of a client that has gone."""
        for sequence in [s for s in self._sequences.values() if s.client == client]:
            self._close(sequence, "aborted", "its client has gone")

    def _close(self, sequence: Sequence, outcome: str, cause: str) -> None:
        """End a request.

        Args:
            outcome: ``completed``, ``aborted`` or ``failed``.
        """
        if sequence.phase is Phase.WAITING:
            self._queue.remove(sequence)
        self._enter(sequence, Phase.FINISHED)
        self._speculation.on_ended(sequence.request, sequence.tokens)
        del self._sequences[sequence.client, sequence.id]
        self.counts[outcome] += 1
        self._queue.on_request_ended(self._clock.now)
        self._metrics.on_ended(sequence, outcome)
        num_tokens = len(sequence.tokens) - sequence.num_prompt_tokens
        logger.debug("request %s: finished, %s (%s), %d tokens", sequence.id, outcome, cause, num_tokens)
