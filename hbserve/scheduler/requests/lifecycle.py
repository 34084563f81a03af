"""The life of every request: from the waiting queue through its allocations to its end, and back."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from collections.abc import Sequence as Items

from hbserve.messages.tiers import FoundBlocks, TierResult
from hbserve.messages.transfer import TransferResult
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.requests.step_results import StepResults
from hbserve.scheduler.sequence import InflightStep, Phase, Sequence
from hbserve.scheduler.tiers.copies import KVLoad
from hbserve.scheduler.worker import WorkerHandle

logger = logging.getLogger(__name__)


class RequestLifecycle(StepResults):
    """All open requests, and all that happens to them: admission, steps, copies, transfers, losses, ends."""

    # --- waiting -> prefilling -----------------------------------------------------------------------

    def predicted_ttft_s(self, sequence: Sequence) -> float:
        """Predict how long a request that has just come would wait for its first token."""
        return self._queue.predicted_ttft_s(sequence, self._instances, self._admission.is_full, self._clock.now)

    def in_order(self) -> Items[Sequence]:
        """Return the waiting requests in the order of admission."""
        return self._queue.in_order(self._instances, self._clock.now)

    def admit(self, sequence: Sequence) -> bool:
        """Give a waiting request its allocations for prefill and decode, both or neither; False if nothing fits now.

        Best-effort requests give their place to others.
        """
        while not self._admission.allocate(sequence):
            if sequence.is_batch or not self._make_room():
                return False
        self._queue.remove(sequence)
        self._enter(sequence, Phase.PREFILLING)
        allocation = sequence.prefill_allocation
        assert allocation is not None
        is_first = sequence.num_cached_tokens is None
        if sequence.first_token_time is None:  # what an earlier attempt had is of no use to this one
            self._note_cached(sequence, min(allocation.num_planned, sequence.num_prompt_tokens))
        if is_first:
            self.counts["prompt_tokens"] += sequence.num_prompt_tokens
            self._metrics.on_admitted(sequence)
        else:
            self._metrics.on_cached(sequence)
        instances = " and ".join(a.instance_id for a in sequence.allocations)
        cached, blocks = allocation.num_planned, sum(len(a.block_ids) for a in sequence.allocations)
        logger.debug("request %s: admitted to %s, %d cached tokens, %d blocks", sequence.id, instances, cached, blocks)
        self.tiers.begin_load(self._instances[allocation.instance_id], sequence, allocation)
        return True

    def _make_room(self) -> bool:
        """Preempt the best-effort request that came last; False if there is none, or memory is about to be freed."""
        if not self._admission.is_full or any(i.pool.num_pending_blocks for i in self._instances.ready):
            return False
        victims = (s for s in self._sequences.values() if s.is_batch and s.allocations)
        victim = max(victims, key=lambda sequence: sequence.arrival, default=None)
        if victim is None:
            return False
        self.preempt(victim)
        return True

    # --- KV tiers and transfers ----------------------------------------------------------------------

    def on_tier_result(self, worker: WorkerHandle, result: TierResult) -> None:
        """A worker has ended a copy to or from a tier."""
        load = self.tiers.on_result(worker, result)
        if load is not None:
            self._on_loaded(load)

    def on_blocks_found(self, worker: WorkerHandle, found: FoundBlocks) -> None:
        """A tier has answered a lookup."""
        self._lookups.on_found(worker, found)

    def on_copies_lost(self, worker: WorkerHandle) -> None:
        """A worker's process has ended, or begun anew: it copies nothing any more."""
        self._lookups.on_worker_ended(worker)
        for load in self.tiers.on_worker_ended(worker):
            self._on_loaded(load)

    def expire_copies(self) -> None:
        """Compute the prompts whose loads are late, in other blocks: a late load may still write into theirs."""
        self._lookups.expire()
        for load in self.tiers.expire():
            if load.attempt == load.sequence.attempt and load.sequence.phase is Phase.PREFILLING:
                self._put_back(load.sequence)
                self._count_retry(load.sequence, "a KV tier is late")

    def _on_loaded(self, load: KVLoad) -> None:
        """A load has ended: go on behind it when all before it is computed."""
        sequence, allocation = load.sequence, load.allocation
        if load.attempt != sequence.attempt or sequence.phase is not Phase.PREFILLING:
            return
        assert allocation.load_start is not None, "a load that nothing waits for"
        allocation.loaded_end = load.num_blocks * allocation.pool.block_size
        allocation.is_load_short = not all(load.sound)
        self._count_cached(sequence, min(allocation.loaded_end, sequence.num_prompt_tokens) - allocation.load_start)
        logger.debug("request %s: loaded up to token %d", sequence.id, allocation.loaded_end)
        self._join_load(sequence, allocation)

    def on_transfer_ended(self, result: TransferResult) -> None:
        """One side of a transfer has ended, well or not."""
        outcome = self._transfers.on_result(result)
        if outcome.failed:
            link = outcome.failed[0].link
            where = f"{link.source.id} to {link.target.id}"
            self._events.note("transfer_failed", f"KV transfer from {where}", f"{result.transfer_id}: {result.error}")
            self._retry_all(outcome.failed, f"KV transfer: {result.error}")
            self._transfers.connect(self._instances.values())
        transfer = outcome.arrived
        if transfer is None or transfer.attempt != transfer.sequence.attempt:
            return
        sequence = transfer.sequence
        sequence.open_transfers.discard(transfer.transfer_id)
        num_blocks = len(transfer.target_blocks)
        logger.debug("request %s: transfer %s arrived, %d blocks", sequence.id, transfer.transfer_id, num_blocks)
        if sequence.phase is Phase.TRANSFERRING and not sequence.open_transfers:
            self._transfers.count_exposed(transfer, self._clock.now - sequence.prefilled_at)
        self._start_decoding_if_arrived(sequence)

    # --- losses --------------------------------------------------------------------------------------

    def on_worker_lost(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        """A worker is lost, but not the memory: void the rows at other workers that continue its unconfirmed rows.

        Its own rows are planned again when its process has ended (`on_steps_lost`): until then it may write.
        """
        starts = {
            row.allocation: row.start for step in reversed(worker.inflight) for row in step.rows if not row.is_void
        }
        for other in instance.workers.values():
            for step in other.inflight if other is not worker else ():
                for row in step.rows:
                    if row.start > starts.get(row.allocation, math.inf) and not row.is_void:
                        row.allocation.void_row(row)
                        row.allocation.last_worker_id = worker.id
        self._part_joined(instance, worker)

    def _part_joined(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        """Compute prompts again that joined blocks in unconfirmed steps: a lost step may have been to fill these."""
        if not instance.arena_epoch:
            return
        instance.pool.forget_planned()
        for other in instance.workers.values():
            for row in (row for step in other.inflight for row in step.rows):
                sequence = row.sequence
                if row.num_joined and row.attempt == sequence.attempt and sequence.phase is not Phase.FINISHED:
                    self._put_back(sequence)
                    self._count_retry(sequence, f"{worker.id} was lost")

    def on_steps_lost(self, steps: Iterable[InflightStep]) -> None:
        """The process of a lost worker has ended: plan its unconfirmed steps again."""
        set_back: set[Sequence] = set()
        for step in steps:
            for row in step.rows:
                sequence = row.sequence
                counts = row.attempt == sequence.attempt and sequence.phase is not Phase.FINISHED and not row.is_void
                if counts:
                    row.allocation.void_row(row)
                row.allocation.end_row(row)
                if not counts or sequence in set_back:
                    continue
                set_back.add(sequence)
                sequence.num_setbacks += 1
                if sequence.num_setbacks >= self._max_attempts:
                    self._give_up(sequence, f"{sequence.num_setbacks} workers in a row were lost in its steps")

    def on_memory_lost(self, instance: InstanceHandle, reason: str) -> None:
        """An instance's KV is gone: requests that were admitted there are computed again from their tokens."""
        allocations = instance.allocations | instance.reserved
        failed = self._transfers.on_instance_lost(instance)
        self.tiers.on_memory_lost(instance)
        for worker in instance.workers.values():
            self._lookups.on_worker_ended(worker)
        instance.reset()
        instance.note_lost(reason)
        for sequence, allocation in allocations.items():
            if allocation.num_inflight:  # one of these may have caused the loss; the others are innocent
                self._retry(sequence, reason)
            else:
                self._put_back(sequence)
                self._count_retry(sequence, reason)
        self._retry_all(failed, reason)
