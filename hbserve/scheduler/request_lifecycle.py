"""The life of every request: from the waiting queue through its allocations to its end, and back.

    waiting ──► prefilling ──► transferring ──► decoding ──► finished
       ▲            │               │              │
       └────────────┴───────────────┴──────────────┘  preempted, or an attempt failed

Nobody else changes a request's phase, gives it an allocation or takes one away, or tells its client of it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items

from hbserve.config import Config
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.client import RequestOutput
from hbserve.messages.transfer import TransferResult
from hbserve.messages.worker import StepResult
from hbserve.policy.queue_policy import QueuePolicy
from hbserve.scheduler.admission import Admission, free_allocation
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.metrics import EventLog, SchedulerMetrics
from hbserve.scheduler.sequence import InflightStep, KVAllocation, Phase, Sequence
from hbserve.scheduler.transfer_tracker import Transfer, TransferTracker
from hbserve.scheduler.waiting_queue import WaitingQueue
from hbserve.scheduler.worker import WorkerHandle

logger = logging.getLogger(__name__)

_RETRY_DELAY_S = 0.1
_LONGEST_RETRY_DELAY_S = 5.0
_FORGIVEN_AFTER_TOKENS = 16
"""Since a failed attempt: a request at which its workers die gets one token from its prefill, and no more."""


class RequestLifecycle:
    """All open requests, and every turn that one of them can take.

    Args:
        config: of the system.
        instances: where allocations are, by id.
        transfers: what brings KV from one allocation to the other.
        metrics: told of every turn.
        events: told of transfers that failed.
        push: a request's output to its client.
        wake: has the scheduler plan again.

    Attributes:
        waiting: those not yet admitted, in the order of the policy.
        counts: of what has happened since the start, by name.
    """

    def __init__(
        self,
        config: Config,
        instances: Mapping[str, InstanceHandle],
        transfers: TransferTracker,
        metrics: SchedulerMetrics,
        events: EventLog,
        push: Callable[[bytes, RequestOutput], None],
        wake: Callable[[], None],
    ) -> None:
        self.waiting: list[Sequence] = []
        self.counts: defaultdict[str, int] = defaultdict(int)
        self._sequences: dict[tuple[bytes, str], Sequence] = {}
        self._instances = instances
        self._transfers = transfers
        self._metrics = metrics
        self._events = events
        self._push = push
        self._wake = wake
        self._queue = WaitingQueue(config)
        self._admission = Admission(instances, config, self._queue.policy, transfers.is_open)
        self._max_attempts = config.kv_transfer.max_attempts
        self._shares_prefixes = config.performance.enable_prefix_caching

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def policy(self) -> QueuePolicy:
        """Whose prompt goes first."""
        return self._queue.policy

    def get(self, client: bytes, request_id: str) -> Sequence | None:
        """A client's open request."""
        return self._sequences.get((client, request_id))

    # --- waiting -> prefilling -------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """A request has been taken, and begins to wait."""
        self._sequences[sequence.client, sequence.request.request_id] = sequence
        if not self.waiting:
            self._queue.begins(sequence.arrival_time)
            self._admission.is_full = False
        self._queue.insert(self.waiting, sequence)
        self._metrics.arrived(sequence)

    def predicted_ttft_s(self, sequence: Sequence) -> float:
        """How long a request that is not yet here would wait for its first token."""
        return self._queue.predicted_ttft_s(
            sequence, self.waiting, self._instances.values(), self._admission.is_full, time.monotonic()
        )

    def in_order(self, now: float) -> Items[Sequence]:
        """Who is to be admitted first."""
        return self._queue.in_order(self.waiting, self._instances.values(), now)

    def admit(self, sequence: Sequence) -> bool:
        """KVAllocation a waiting request for prefill and decode, both or neither; False if nothing fits now."""
        if not self._admission.allocate(sequence):
            return False
        self.waiting.remove(sequence)
        sequence.phase = Phase.PREFILLING
        if sequence.num_cached_tokens is None:
            assert sequence.prefill_allocation is not None
            sequence.num_cached_tokens = min(sequence.prefill_allocation.num_planned, sequence.num_prompt_tokens)
            self.counts["prompt_tokens"] += sequence.num_prompt_tokens
            self.counts["cached_prompt_tokens"] += sequence.num_cached_tokens
            self._metrics.admitted(sequence)
        return True

    # --- steps -----------------------------------------------------------------------------------

    def step_done(self, worker: WorkerHandle, result: StepResult) -> None:
        """A worker has done its oldest step in flight: KV has grown, and tokens are here."""
        step = worker.inflight.popleft()
        assert step.step_id == result.step_id, "a worker answers in order"
        worker.work.num_steps += 1
        worker.work.busy_s += result.busy_s
        worker.work.host_s += result.host_s
        if step.rows:
            worker.last_step_s = result.busy_s
        worker.timing.on_confirmed(time.monotonic(), result.busy_s, result.early_s)
        samples = iter(zip(result.token_ids, result.logprobs or [None] * len(result.token_ids), strict=True))
        now = time.monotonic()
        last_token_times: list[float | None] = []
        for row in step.rows:
            sample = next(samples) if row.samples else None
            sequence, allocation = row.sequence, row.allocation
            if row.is_void:
                allocation.pool.unpin(allocation.owner)
                continue
            if row.attempt == sequence.attempt and sequence.phase is not Phase.FINISHED:
                self._advance(sequence, allocation, row.end)
                if sample is not None:
                    worker.work.num_tokens += 1
                    last_token_times.append(sequence.last_token_time)
                    sequence.last_token_time = now
                    self._on_token(sequence, allocation, *sample)
            allocation.num_inflight -= 1
            allocation.pool.unpin(allocation.owner)
        assert next(samples, None) is None, "more samples than rows that sample"
        self._queue.step_done(step, result.busy_s)
        self._metrics.step_done(worker.id, step, result.busy_s, now, last_token_times)

    def _advance(self, sequence: Sequence, allocation: KVAllocation, num_computed: int) -> None:
        """KV up to ``num_computed`` is there; full blocks become sharable."""
        allocation.num_computed = num_computed
        if not self._shares_prefixes:
            return
        full = num_computed // allocation.pool.block_size
        if full > allocation.num_sealed:
            hashes = sequence.hashes(allocation.pool.block_size)
            for index in range(allocation.num_sealed, full):
                allocation.pool.seal_block(allocation.owner, index, hashes[index])
            allocation.num_sealed = full

    def _on_token(
        self, sequence: Sequence, allocation: KVAllocation, token: int, logprobs: TokenLogprobs | None
    ) -> None:
        assert allocation.num_computed == len(sequence.tokens), "a token for another position than the next"
        sequence.tokens.append(token)
        sequence.num_setbacks = 0
        if sequence.num_failures and len(sequence.tokens) - sequence.num_tokens_at_failure >= _FORGIVEN_AFTER_TOKENS:
            sequence.num_failures = 0
        self.counts["generated_tokens"] += 1
        is_first = sequence.first_token_time is None
        if is_first:
            sequence.first_token_time = time.monotonic()
            self._metrics.first_token(sequence)
        finish_reason = None
        if token in sequence.end_token_ids:
            finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.max_total_tokens:
            finish_reason = "length"
        self._push(
            sequence.client,
            RequestOutput(
                request_id=sequence.request.request_id,
                token_ids=[token],
                logprobs=None if logprobs is None else [logprobs],
                finish_reason=finish_reason,
                num_cached_tokens=(sequence.num_cached_tokens or 0) if is_first else 0,
            ),
        )
        if finish_reason is not None:
            self._close(sequence, "completed")
        elif allocation is sequence.prefill_allocation and allocation is not sequence.decode_allocation:
            self._leave_prefill(sequence, allocation)
        else:
            sequence.phase = Phase.DECODING

    def worker_lost(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        """What others have in flight that goes on from its unconfirmed steps counts for nothing from now on.

        The sequences wait for the end of the worker's process (`steps_lost`): until then it may write.
        """
        starts = {
            row.allocation: row.start for step in reversed(worker.inflight) for row in step.rows if not row.is_void
        }
        for other in instance.workers.values():
            for step in other.inflight if other is not worker else ():
                for row in step.rows:
                    if row.start > starts.get(row.allocation, math.inf) and not row.is_void:
                        row.is_void = True
                        row.allocation.roll_back(row.start)
                        row.allocation.last_worker = worker

    def steps_lost(self, steps: Iterable[InflightStep]) -> None:
        """Steps that nobody will confirm, of a process that cannot write any more: others do them again."""
        set_back: set[Sequence] = set()
        for step in steps:
            for row in step.rows:
                sequence, allocation = row.sequence, row.allocation
                allocation.pool.unpin(allocation.owner)
                if row.attempt != sequence.attempt or sequence.phase is Phase.FINISHED or row.is_void:
                    continue
                allocation.roll_back(row.start)
                if sequence in set_back:
                    continue
                set_back.add(sequence)
                sequence.num_setbacks += 1
                if sequence.num_setbacks >= self._max_attempts:
                    self.fail(sequence, f"{sequence.num_setbacks} workers in a row were lost in its steps")

    # --- prefilling -> transferring -> decoding --------------------------------------------------

    def _leave_prefill(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """The prompt is done; its blocks stay pinned here until they have arrived where decode happens."""
        free_allocation(sequence, allocation)
        sequence.prefill_allocation = None
        sequence.phase = Phase.TRANSFERRING
        sequence.prefilled_at = time.monotonic()
        self._start_decoding_if_arrived(sequence)

    def transfer_ended(self, result: TransferResult) -> None:
        """One side of a transfer has ended, well or not."""
        outcome = self._transfers.on_result(result)
        if outcome.failed:
            link = outcome.failed[0].link
            where = f"{link.source.id} to {link.target.id}"
            logger.warning("KV transfer %s from %s failed: %s", result.transfer_id, where, result.error)
            self._events.note("fault", f"KV transfer from {where}", result.error or "")
            self._retry_all(outcome.failed, f"KV transfer: {result.error}")
            self._transfers.connect(self._instances.values())
        transfer = outcome.arrived
        if transfer is None or transfer.attempt != transfer.sequence.attempt:
            return
        sequence = transfer.sequence
        sequence.open_transfers.discard(transfer.transfer_id)
        if sequence.phase is Phase.TRANSFERRING and not sequence.open_transfers:
            self._transfers.count_exposed(transfer, time.monotonic() - sequence.prefilled_at)
        self._start_decoding_if_arrived(sequence)

    def _start_decoding_if_arrived(self, sequence: Sequence) -> None:
        if sequence.phase is not Phase.TRANSFERRING or sequence.open_transfers:
            return
        allocation = sequence.decode_allocation
        assert allocation is not None
        self._advance(sequence, allocation, allocation.num_tokens_at_entry)
        sequence.phase = Phase.DECODING
        allocation.instance.activate(sequence, allocation)
        self._metrics.decode_may_start(sequence)

    # --- back to waiting -------------------------------------------------------------------------

    def memory_lost(self, instance: InstanceHandle, why: str) -> None:
        """An instance's KV is gone: who was admitted there is computed again, from tokens that are all here."""
        allocations = {
            s: [allocation for allocation in s.allocations if allocation.instance is instance]
            for s in self._sequences.values()
        }
        # It may have been one of these that the memory was lost by; those that only had an allocation are innocent.
        at_work = {
            sequence for sequence, own in allocations.items() if any(allocation.num_inflight for allocation in own)
        }
        failed = self._transfers.lose(instance)
        instance.reset()
        instance.note_lost(why)
        for sequence, own in allocations.items():
            if sequence in at_work:
                self._retry(sequence, why)
            elif own:
                self._count_retry(sequence)
                self._put_back(sequence)
        self._retry_all(failed, why)

    def preempt(self, sequence: Sequence) -> None:
        """It gives its blocks to an older one."""
        self.counts["preemptions"] += 1
        self._metrics.preempted(sequence)
        self._put_back(sequence)

    def _retry_all(self, failed: list[Transfer], why: str) -> None:
        for transfer in failed:
            if transfer.attempt == transfer.sequence.attempt and transfer.sequence.phase is not Phase.FINISHED:
                self._retry(transfer.sequence, why)

    def _retry(self, sequence: Sequence, why: str) -> None:
        """An attempt failed through no fault of the request: compute again, but not for ever."""
        sequence.num_failures += 1
        sequence.num_tokens_at_failure = len(sequence.tokens)
        if sequence.num_failures >= self._max_attempts:
            self.fail(sequence, f"gave up after {sequence.num_failures} attempts; the last: {why}")
        else:
            self._count_retry(sequence)
            self._put_back(sequence)
            # Not at once: what made it fail may take a moment to be noticed.
            delay_s = min(_RETRY_DELAY_S * 2 ** (sequence.num_failures - 1), _LONGEST_RETRY_DELAY_S)
            sequence.retry_at = time.monotonic() + delay_s
            asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _count_retry(self, sequence: Sequence) -> None:
        self.counts["retries"] += 1
        self._metrics.retried(sequence)

    def _put_back(self, sequence: Sequence) -> None:
        """Back to waiting, with all its tokens; whatever is in flight for it is void."""
        self._free_all_allocations(sequence)
        sequence.attempt += 1
        sequence.phase = Phase.WAITING
        sequence.num_blocks_dispatched = 0
        sequence.open_transfers.clear()
        self._queue.insert(self.waiting, sequence)

    # --- ends ------------------------------------------------------------------------------------

    def finish(self, sequence: Sequence, reason: str, error: str | None = None) -> None:
        """End a request for another reason than its tokens, and tell its client."""
        self._close(sequence, {"abort": "aborted", "error": "failed"}.get(reason, "completed"))
        self._push(
            sequence.client,
            RequestOutput(
                request_id=sequence.request.request_id,
                token_ids=[],
                finish_reason=reason,
                error=error,
                error_kind=None if error is None else "RequestFailedError",
            ),
        )

    def fail(self, sequence: Sequence, error: str) -> None:
        """End a request that cannot be answered."""
        self.finish(sequence, "error", error)

    def abort_all_of(self, client: bytes) -> None:
        """A client has gone, and nobody wants its requests any more."""
        for sequence in [s for s in self._sequences.values() if s.client == client]:
            self._close(sequence, "aborted")

    def _close(self, sequence: Sequence, outcome: str) -> None:
        """Take a request off the books; its blocks return when nothing in flight can touch them.

        Args:
            outcome: ``completed``, ``aborted`` or ``failed``.
        """
        if sequence.phase is Phase.WAITING:
            self.waiting.remove(sequence)
        self._free_all_allocations(sequence)
        sequence.phase = Phase.FINISHED
        del self._sequences[sequence.client, sequence.request.request_id]
        self.counts[outcome] += 1
        self._queue.ended(time.monotonic())
        self._metrics.ended(sequence, outcome)

    def _free_all_allocations(self, sequence: Sequence) -> None:
        for allocation in sequence.allocations:
            free_allocation(sequence, allocation)
        sequence.prefill_allocation = sequence.decode_allocation = None
