"""The life of every request: from the waiting queue through its allocations to its end, and back.

`RequestLifecycle` alone changes a request's phase (diagram and table in `hbserve.scheduler.sequence`), gives it an
allocation or frees one, and sends its client output.

The path of memory: `_enter` decides that an allocation goes, and is the only caller of `free_allocation`::

    _enter ──► free_allocation ──► BlockPool.free ──► BlockPool._free_now
                                     └ pinned by a step or a transfer: KVAllocation.end_row or
                                       end_transfer ──► BlockPool.unpin ──► BlockPool._free_now
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable
from collections.abc import Sequence as Items
from itertools import islice

import msgspec

from hbserve.config import Config
from hbserve.messages.base import TokenLogprobs
from hbserve.messages.client import RequestOutput
from hbserve.messages.tiers import FoundBlocks, TierResult
from hbserve.messages.transfer import TransferResult
from hbserve.messages.worker import NO_TOKEN, StepResult
from hbserve.policy.profile_curves import ProfileCurves
from hbserve.policy.queue_policy import QueuePolicy
from hbserve.scheduler.core_io import Clock, OutboxWriter
from hbserve.scheduler.instance import InstanceHandle, Instances
from hbserve.scheduler.metrics import EventLog, SchedulerMetrics
from hbserve.scheduler.queue.admission import Admission
from hbserve.scheduler.queue.waiting_queue import WaitingQueue
from hbserve.scheduler.sequence import InflightRow, InflightStep, KVAllocation, Phase, Sequence
from hbserve.scheduler.tiers.copies import KVLoad
from hbserve.scheduler.tiers.lookups import TierLookups
from hbserve.scheduler.tiers.tracker import KVTiers
from hbserve.scheduler.transfer import Transfer
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker import WorkerHandle
from hbserve.speculation import Draft, PredictionDrafter, Speculation
from hbserve.speculation.drafters import EAGLE3
from hbserve.speculation.rounds import accepted_tokens

logger = logging.getLogger(__name__)

_RETRY_DELAY_S = 0.1
_MAX_RETRY_DELAY_S = 5.0
_MASK_DELAY_S = 0.01
_MAX_MASK_DELAY_S = 0.16
_TOKENS_TO_FORGIVE = 16
"""Tokens after which a failed attempt no longer counts. A request that kills workers gets one token at most, from
its prefill."""


class RequestLifecycle:
    """All open requests, and every change of their phases.

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

    # --- waiting -> prefilling -------------------------------------------------------------------

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
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(allocation.num_planned, sequence.num_prompt_tokens)
            self.counts["prompt_tokens"] += sequence.num_prompt_tokens
            self.counts["cached_prompt_tokens"] += sequence.num_cached_tokens
            self._metrics.on_admitted(sequence)
        instances = " and ".join(a.instance_id for a in sequence.allocations)
        cached, blocks = allocation.num_planned, sum(len(a.block_ids) for a in sequence.allocations)
        logger.debug("request %s: admitted to %s, %d cached tokens, %d blocks", sequence.id, instances, cached, blocks)
        if allocation.stored_runs:
            self.tiers.begin_load(self._instances[allocation.instance_id], sequence, allocation, allocation.stored_runs)
            allocation.stored_runs = []
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

    # --- KV tiers --------------------------------------------------------------------------------

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
        self._count_cached(sequence, min(allocation.loaded_end, sequence.num_prompt_tokens) - allocation.load_start)
        logger.debug("request %s: loaded up to token %d", sequence.id, allocation.loaded_end)
        self._join_load(sequence, allocation)

    def _join_load(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """Go on behind a load if it has ended and all before it is computed; what is not intact is computed."""
        start, end = allocation.load_start, allocation.loaded_end
        if start is None or end is None or allocation.num_computed < start:
            return
        allocation.load_start = allocation.loaded_end = None
        if end > start:
            self._advance(sequence, allocation, end)
            allocation.num_planned = end
        self._instances[allocation.instance_id].activate(sequence, allocation)

    def _on_joined(self, sequence: Sequence, row: InflightRow) -> None:
        """A row has been computed behind blocks that were computed for others."""
        self._count_cached(sequence, min(row.start, sequence.num_prompt_tokens) - (row.start - row.num_joined))
        logger.debug("request %s: joined others up to token %d", sequence.id, row.start)

    def _count_cached(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that more of a prompt has come from others than there was at its admission."""
        if num_tokens > 0 and sequence.first_token_time is None:
            sequence.num_cached_tokens = (sequence.num_cached_tokens or 0) + num_tokens
            self.counts["cached_prompt_tokens"] += num_tokens
            self._metrics.on_more_cached(sequence)

    # --- steps -----------------------------------------------------------------------------------

    def on_step_done(self, worker: WorkerHandle, result: StepResult) -> None:
        """A worker has computed its oldest step in flight: KV has grown, and tokens are here."""
        now = self._clock.now
        step = worker.end_step(result, now)
        token_ids, logprobs, scores = result.token_ids, result.logprobs, iter(result.prompt_logprobs or ())
        draft_ids = iter(result.draft_ids)
        last_token_times: list[float | None] = []
        num_batch_tokens = 0
        index = 0  # of the next sample
        for row in step.rows:
            sequence, allocation = row.sequence, row.allocation
            counts = not row.is_void and row.attempt == sequence.attempt and sequence.phase is not Phase.FINISHED
            prompt_logprobs = next(scores) if row.scores else None
            draft = row.draft
            if draft is not None and draft.num_to_draft:
                made = [*islice(draft_ids, draft.num_to_draft)]
                draft = draft.made(made, sequence.tokens) if counts else draft
            if counts and prompt_logprobs is not None:
                self._on_prompt_logprobs(sequence, row.start, prompt_logprobs)
            if counts and row.samples and token_ids[index] == NO_TOKEN:
                self._on_no_token(sequence, allocation, row, (result.row_errors or {}).get(index))
            elif counts and draft is not None:
                end = index + row.num_samples
                last = sequence.last_token_time
                number = self._on_draft(
                    sequence, allocation, row, draft, token_ids[index:end], logprobs and logprobs[index:end]
                )
                sequence.last_token_time = now
                if sequence.is_batch:
                    num_batch_tokens += number
                else:
                    last_token_times += [last, *[now] * (number - 1)]
            elif counts:
                if row.num_joined:
                    self._on_joined(sequence, row)
                self._advance(sequence, allocation, row.end)
                self._join_load(sequence, allocation)
                if row.samples:
                    if sequence.is_batch:
                        num_batch_tokens += 1
                    else:
                        last_token_times.append(sequence.last_token_time)
                    sequence.last_token_time = now
                    self._on_token(sequence, allocation, token_ids[index], logprobs[index] if logprobs else None)
            end = index + (row.samples if row.draft is None else row.num_samples)
            if counts and result.forced and (forced := result.forced.get(end - 1)) and sequence.speculator is not None:
                self._on_forced(sequence, row, forced)
            if result.more:
                assert draft is not None, "a row of a step with rounds has a draft, perhaps an empty one"
                row.begin_round(draft, len(accepted_tokens(draft.token_ids, token_ids[index:end])))
            else:
                allocation.end_row(row)
            index = end
        num_tokens = len(last_token_times) + num_batch_tokens
        worker.work.num_tokens += num_tokens
        worker.gain.on_result(now, step.tried, num_tokens)
        self.counts["generated_tokens"] += num_tokens
        self._queue.on_step_done(step, result.busy_s)
        self._metrics.on_step_done(worker.id, step, result.busy_s, now, last_token_times, num_batch_tokens)

    def _on_forced(self, sequence: Sequence, row: InflightRow, forced: list[int]) -> None:
        """If all of a row's draft was right, its grammar leaves no choice of these tokens, from its last sample on."""
        assert sequence.speculator is not None, "a sequence with a grammar guesses what it forces"
        if len(sequence.tokens) == row.end + 1 and sequence.tokens[-1] == forced[0]:
            sequence.speculator.expect(len(sequence.tokens), forced[1:])

    def _on_no_token(self, sequence: Sequence, allocation: KVAllocation, row: InflightRow, error: str | None) -> None:
        """A worker has computed a row, but not the mask of its grammar: plan the last position again, a little later.

        Args:
            error: why there will never be a mask; None: there may be.
        """
        if error is not None:
            self.finish(sequence, "error", error, "InvalidRequestError", "grammar")
            return
        last = row.end - row.num_samples
        self._advance(sequence, allocation, last)
        allocation.num_planned, allocation.is_drafting = last, False
        delay_s = min(_MASK_DELAY_S * 2**sequence.num_late_masks, _MAX_MASK_DELAY_S)
        sequence.num_late_masks += 1
        sequence.planned_from = self._clock.now + delay_s

    def _on_draft(
        self,
        sequence: Sequence,
        allocation: KVAllocation,
        row: InflightRow,
        draft: Draft,
        sampled: list[int],
        logprobs: list[TokenLogprobs | None] | None,
    ) -> int:
        """A worker has verified a draft: take the tokens that count, and compute the places of wrong ones again.

        Returns:
            The number of new tokens, at least 1.
        """
        token_ids = accepted_tokens(draft.token_ids, sampled)
        if token_ids[-1] == NO_TOKEN:  # the mask behind the last right guess was not there
            del token_ids[-1]
        num_accepted = len(token_ids) - 1
        allocation.num_planned, allocation.is_drafting = row.start + len(token_ids), False
        if row.num_to_draft:  # a draft model has not read the last guess, and a head reads all again
            num_read = 1 if draft.drafter == EAGLE3 else min(len(token_ids), row.num_to_draft)
            allocation.num_read = row.start + num_read
            allocation.note_read_blocks(row.start)
        self.counts[f"drafts_{draft.drafter}"] += bool(draft.token_ids)
        self.counts[f"drafted_{draft.drafter}"] += len(draft.token_ids)
        self.counts[f"accepted_{draft.drafter}"] += num_accepted
        tried = num_accepted, len(draft.token_ids) - num_accepted
        for index, token in enumerate(token_ids):
            self._advance(sequence, allocation, row.start + index + 1)
            predicted = tried if draft.drafter == PredictionDrafter.name and not index else None
            self._on_token(sequence, allocation, token, logprobs[index] if logprobs else None, predicted)
            if sequence.phase is Phase.FINISHED:
                return index + 1
        return len(token_ids)

    def _advance(self, sequence: Sequence, allocation: KVAllocation, num_computed: int) -> None:
        """Note that KV up to ``num_computed`` is there; full blocks become sharable."""
        allocation.num_computed = num_computed
        if not self._shares_prefixes:
            return
        full = num_computed // allocation.pool.block_size
        if full > allocation.num_sealed:
            hashes = sequence.hashes(allocation.pool.block_size)
            for index in range(allocation.num_sealed, full):
                allocation.pool.seal_block(allocation.owner, index, hashes[index])
            instance = self._instances[allocation.instance_id]
            self.tiers.offer(instance, allocation, hashes[allocation.num_sealed : full], allocation.num_sealed)
            allocation.num_sealed = full

    def _on_prompt_logprobs(self, sequence: Sequence, start: int, prompt_logprobs: list[TokenLogprobs]) -> None:
        """Send on what the client does not have yet: a row that is computed again reports the same tokens again."""
        assert start <= sequence.num_scored, "log-probabilities of a part of the prompt are missing"
        new = prompt_logprobs[sequence.num_scored - start :]
        if new:
            sequence.num_scored += len(new)
            output = RequestOutput(request_id=sequence.id, token_ids=[], prompt_logprobs=new)
            self._outbox.push(sequence.client, output, sequence.first_token_time is None)

    def _on_token(
        self,
        sequence: Sequence,
        allocation: KVAllocation,
        token: int,
        logprobs: TokenLogprobs | None,
        predicted: tuple[int, int] | None = None,
    ) -> None:
        """Take the next token; ``predicted``: how many tokens of the request's prediction were right, and wrong."""
        assert allocation.num_computed == len(sequence.tokens), "a token for another position than the next"
        sequence.tokens.append(token)
        sequence.num_setbacks = sequence.num_late_masks = 0
        if sequence.num_failures and len(sequence.tokens) - sequence.num_tokens_at_failure >= _TOKENS_TO_FORGIVE:
            sequence.num_failures = 0
        is_first = sequence.first_token_time is None
        if is_first:
            sequence.first_token_time = self._clock.now
            self._metrics.on_first_token(sequence)
            logger.debug("request %s: first token, from %s", sequence.id, allocation.instance_id)
        finish_reason = None
        if token in sequence.end_token_ids:
            finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.max_total_tokens:
            finish_reason = "length"
        output = RequestOutput(
            request_id=sequence.request.request_id,
            token_ids=[token],
            logprobs=None if logprobs is None else [logprobs],
            finish_reason=finish_reason,
            num_cached_tokens=(sequence.num_cached_tokens or 0) if is_first else 0,
        )
        if predicted is not None:
            output = msgspec.structs.replace(output, num_accepted=predicted[0], num_rejected=predicted[1])
        self._outbox.push(sequence.client, output, is_first)
        if finish_reason is not None:
            self._close(sequence, "completed", finish_reason)
        elif allocation is sequence.prefill_allocation and allocation is not sequence.decode_allocation:
            self._on_prefilled(sequence)
        elif sequence.phase is not Phase.DECODING:
            self._enter(sequence, Phase.DECODING)

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

    # --- prefilling -> transferring -> decoding --------------------------------------------------

    def _on_prefilled(self, sequence: Sequence) -> None:
        """The prompt is computed; transfers pin its blocks here until they have arrived at the decode instance."""
        self._enter(sequence, Phase.TRANSFERRING)
        sequence.prefilled_at = self._clock.now
        self._start_decoding_if_arrived(sequence)

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

    def _start_decoding_if_arrived(self, sequence: Sequence) -> None:
        if sequence.phase is not Phase.TRANSFERRING or sequence.open_transfers:
            return
        allocation = sequence.decode_allocation
        assert allocation is not None
        self._advance(sequence, allocation, allocation.num_tokens_at_entry)
        self._enter(sequence, Phase.DECODING)
        self._instances[allocation.instance_id].activate(sequence, allocation)
        self._metrics.on_kv_arrived(sequence)

    # --- back to waiting -------------------------------------------------------------------------

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

    # --- ends ------------------------------------------------------------------------------------

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
