"""Plans: the contents of a worker's next step, from the scheduler's records."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

from hbserve.config import MAX_DRAFT_TOKENS, Config, InstanceRole
from hbserve.messages.transfer import LayerGroup
from hbserve.messages.worker import PlanRow, SequenceState, StepPlan, StepRef
from hbserve.policy.mixed_step_budget import MIN_ROWS, MIN_TOKENS_ALONE, StepTimeBudget
from hbserve.policy.queue_policy import QueuePolicy
from hbserve.policy.step_time_predictor import StepWork, num_pairs
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import InflightStep, KVAllocation, Sequence
from hbserve.scheduler.steps.decode_planner import Allocations, DecodePlanner
from hbserve.scheduler.steps.step_builder import Leaving, StepBuilder
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker import WorkerHandle, phases_of
from hbserve.scheduler.worker_choice import StepLimit

logger = logging.getLogger(__name__)

_MAX_LAYER_GROUPS = 4
"""Layer groups of all last chunks in a step."""
_MAX_ROUNDS_S = 24e-3
"""Time that all rounds of a step take together; a prompt that comes meanwhile waits for them."""
_MAX_ROUNDS_SHARE = 0.05
"""The same as a part of the tightest TTFT target."""
_MIN_JOINING = 2
"""Tokens of a row that joins blocks which its own step fills. The kernel for rows of one token reads KV of earlier
steps before it waits for what this step writes (`hbserve.attention.paged_decode`)."""


class StepPlanner:
    """Plans a worker's steps: decode rows first, then prompt chunks up to the budgets, then best-effort work.

    Args:
        transfers: opens the transfers of computed chunks.
        preempt: puts a sequence back to waiting, because an older one needs its blocks.
        policy: says which prompt goes first.
        last_step_id: number before the first step's.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        transfers: TransferTracker,
        preempt: Callable[[Sequence], None],
        policy: QueuePolicy,
        last_step_id: int,
    ) -> None:
        self._policy = policy
        self._is_chunked, self._max_chunk = config.chunked_prefill.enabled, config.max_chunk
        self._max_num_batched_tokens = config.performance.max_num_batched_tokens
        self._transfers = transfers
        self._decodes = DecodePlanner(config, preempt)
        self._logs_plans = logger.isEnabledFor(logging.DEBUG)
        self._layer_group_bytes = config.kv_transfer.layer_group_bytes
        self._clock = clock
        self._last_step_id = last_step_id

    def plan_step(self, instance: InstanceHandle, worker: WorkerHandle, phases: set[InstanceRole]) -> bool:
        """Send a worker of the instance its next step, decodes first; False if there is nothing to do."""
        step = StepBuilder(worker, instance.choice.is_shared(phases))
        # Oldest first: a shortage of blocks preempts the youngest, which is not in the plan yet.
        now = self._clock.now
        items = [item for item in instance.allocations.items() if item[0].planned_from <= now]
        if len(items) < len(instance.allocations):
            instance.wake_at(min(at for sequence in instance.allocations if (at := sequence.planned_from) > now))
        allocations = sorted(items, key=lambda item: item[0].arrival)
        batch = [item for item in allocations if item[0].is_batch]
        others = [item for item in allocations if not item[0].is_batch] if batch else allocations
        limit = instance.choice.step_limit(worker, phases, self._policy.tightest_ttft_s)
        predictor, has_decodes = worker.timing.predictor, False
        if InstanceRole.DECODE in phases and limit.takes_decodes:
            # Prompts that wait need the time more: drafts and the wait for their results would make them late.
            may_draft = not (InstanceRole.PREFILL in phases and instance.prompts)
            may_repeat = not (instance.prompts or batch) and worker.cell is None
            max_rounds_s = min(_MAX_ROUNDS_S, _MAX_ROUNDS_SHARE * self._policy.tightest_ttft_s) if may_repeat else 0.0
            if not self._decodes.plan(step, instance, others, None, may_draft, max_rounds_s):
                return False
            has_decodes = bool(step.rows)
        if InstanceRole.PREFILL in phases:
            budget = StepTimeBudget(predictor, step.work, limit.seconds, limit.min_prompt_tokens)
            self._plan_prompts(step, instance, others, limit.prompt_tokens, budget)
        if batch:
            self._plan_batch(step, instance, batch, phases, limit)
        if not step.rows:
            if worker.role is worker.prepared_for or worker.inflight:
                return False
            # A later scheduler learns the role from the worker, which has to be told of it.
            self._send(instance, worker, step, worker.role)
            return True
        self._open_transfers(instance, step)
        if has_decodes:
            instance.choice.on_decode_step()
            if limit.is_accounted:
                instance.choice.on_mixed_step(now, bool(step.prefill_rows))
        self._send(instance, worker, step, worker.role)
        return True

    def _plan_prompts(
        self,
        step: StepBuilder,
        instance: InstanceHandle,
        allocations: Allocations,
        max_tokens: int,
        time_budget: StepTimeBudget,
    ) -> None:
        budget = self._max_num_batched_tokens - step.num_tokens
        if self._is_chunked:
            budget = min(budget, max_tokens - step.prefill_tokens)
        for sequence, allocation in self._in_order(allocations):
            if allocation.num_to_prefill <= 0 or sequence not in instance.allocations:
                continue
            if not instance.choice.can_take(step.worker, allocation) or not self._can_leave(sequence, allocation):
                continue
            # What no row of this step fills may be read by a row of any length.
            min_tokens = _MIN_JOINING if step.prefill_rows else 1
            start, end = _what_to_compute(sequence, allocation, min_tokens)
            remaining = end - start
            if self._is_chunked:
                chunk = min(remaining, self._max_chunk, budget)
                if chunk > 0:
                    chunk = 0 if time_budget.is_full else time_budget.take(chunk, start)
            else:  # whole prompts: the first goes even if it is longer than the budget
                chunk = remaining if (remaining <= budget and not sequence.is_batch) or not step.rows else 0
            if chunk < (min_tokens if start > allocation.num_planned else 1):
                break
            budget -= chunk
            self._plan_prefill(step, sequence, allocation, start, chunk)

    def _plan_batch(
        self,
        step: StepBuilder,
        instance: InstanceHandle,
        batch: Allocations,
        phases: set[InstanceRole],
        limit: StepLimit,
    ) -> None:
        """Put best-effort work into the time that the other work of a step leaves; alone it may always go on."""
        predictor = step.worker.timing.predictor
        limit_s, min_rows = limit.batch_alone_s, MIN_ROWS
        if step.rows:
            min_rows = 0
            # A prompt has waited for a step with best-effort work already. Without targets there is no limit.
            delay_s = 0.0 if step.prefill_rows and limit.batch_delay_s < math.inf else limit.batch_delay_s
            limit_s = min(limit.batch_s, predictor.estimate_s(step.work) + delay_s)
        if InstanceRole.DECODE in phases and limit.takes_decodes:
            decoding = self._decodes.decoding(step, instance, batch)
            budget = StepTimeBudget(predictor, step.work, limit_s)
            num_rows = budget.rows_within([allocation.num_planned for _, allocation in decoding], min_rows)
            self._decodes.plan(step, instance, decoding, num_rows)
        if InstanceRole.PREFILL in phases:
            budget = StepTimeBudget(predictor, step.work, limit_s, 0 if step.rows else MIN_TOKENS_ALONE)
            self._plan_prompts(step, instance, batch, limit.prompt_tokens, budget)

    def introduce(self, instance: InstanceHandle, worker: WorkerHandle) -> None:
        """Tell a new worker of the running sequences, by a step without rows.

        Its first step with rows, which all of them wait for, is then as small as any other. What changes until then is
        in the rows of that step, as for a worker that got no plan for a while.
        """
        step = StepBuilder(worker)
        for sequence, allocation in instance.allocations.items() if worker.role.decodes else ():
            if allocation.num_planned >= allocation.num_tokens_at_entry and not sequence.keeps_state:
                step.tell(sequence, allocation)
        if step.new_sequences:
            self._send(instance, worker, step, worker.role)

    def plan_preparation(self, instance: InstanceHandle, role: InstanceRole) -> None:
        """Have an instance's one worker prepare for another role, by a step without rows."""
        for worker in instance.workers.values():
            self._send(instance, worker, StepBuilder(worker), role)

    def plan_probe(
        self,
        instance: InstanceHandle,
        worker: WorkerHandle,
        rows: list[PlanRow],
        states: list[SequenceState],
        work: StepWork,
    ) -> None:
        """Send a step that belongs to no request; what it samples is dropped.

        Args:
            work: of the rows, each of which samples.
        """
        step = StepBuilder(worker)
        step.rows, step.new_sequences, step.num_samples = rows, states, len(rows)
        self._send(instance, worker, step, worker.role, probe=work)

    def _send(
        self,
        instance: InstanceHandle,
        worker: WorkerHandle,
        step: StepBuilder,
        role: InstanceRole,
        probe: StepWork | None = None,
    ) -> None:
        self._last_step_id += 1
        step_id, after, not_before = self._last_step_id, None, -math.inf
        ahead = instance.choice.steps_ahead(worker) if step.rows else []
        if ahead:
            ends = [end for other, _ in ahead if (end := other.timing.expected_end()) is not None]
            not_before = max(ends, default=-math.inf)
            other, last = max(ahead, key=lambda item: item[1].step_id)
            if last.step_id > worker.has_waited_for:
                assert other.cell is not None, "a worker without a cell cannot be followed"
                after = StepRef(cell=other.cell, step_id=last.step_id)
                worker.has_waited_for = after.step_id
        work = step.work if step.rows else None  # how long a worker prepares for a role is unknown
        inflight = InflightStep(
            step_id=step_id,
            rows=step.inflight,
            num_samples=step.num_samples,
            num_to_draft=step.num_to_draft,
            rounds=step.rounds,
            has_unread=step.unread_tokens > len(step.rows) * (MAX_DRAFT_TOKENS if instance.has_eagle_head else 1),
            num_scores=step.num_scores,
            prefill_rows=step.prefill_rows,
            prefill_tokens=step.prefill_tokens,
            work=probe or work,
            tried=None if probe else step.tried,
            after=0 if after is None else after.step_id,
            is_probe=probe is not None,
        )
        worker.begin_step(inflight, self._clock.now, not_before)
        worker.send(
            StepPlan(
                epoch=worker.epoch,
                step_id=step_id,
                rows=step.rows,
                new_sequences=step.new_sequences,
                sends=step.sends,
                role=role if role is not worker.prepared_for else None,
                cell=worker.cell,
                after=after,
                is_probe=inflight.is_probe,
                rounds=step.rounds,
                rereads=instance.has_eagle_head,
            )
        )
        if role is not worker.prepared_for:
            worker.prepared_for = role
            worker.prepared_phases |= phases_of(role)
        if self._logs_plans:
            names = ", ".join(row.sequence.id for row in step.inflight)
            rows, tokens = len(step.rows), step.prefill_tokens
            logger.debug(
                "step %d: planned for %s, %d rows, %d prompt tokens: %s", step_id, worker.id, rows, tokens, names
            )

    def _in_order(self, allocations: Allocations) -> Allocations:
        """Return the sequences with prompt left to compute, in the policy's order."""
        prefills = [item for item in allocations if item[1].num_to_prefill > 0]
        if len(prefills) < 2:
            return prefills
        now = self._clock.now
        return sorted(prefills, key=lambda item: self._policy.key(item[0], item[1].num_planned, now))

    def _can_leave(self, sequence: Sequence, allocation: KVAllocation) -> bool:
        """Whether the link for a prompt's blocks is open; after the failure of a transfer it opens anew first."""
        target = sequence.decode_allocation
        return (
            target is None
            or target is allocation
            or self._transfers.is_open(allocation.instance_id, target.instance_id)
        )

    def _plan_prefill(
        self, step: StepBuilder, sequence: Sequence, allocation: KVAllocation, start: int, chunk: int
    ) -> None:
        end, size = start + chunk, allocation.pool.block_size
        last = end == allocation.num_tokens_at_entry
        hashes = sequence.hashes(size)
        if (num_joined := start - allocation.num_planned) > 0:
            allocation.join_blocks(hashes, end=start)
        next_token_ids = sequence.next_prompt_tokens(start, end)
        step.add(sequence, allocation, sequence.tokens[start:end], chunk, last, next_token_ids)
        step.inflight[-1].num_joined = num_joined
        filled = slice(start // size, end // size)
        allocation.pool.note_planned(allocation.block_ids[filled], hashes[filled])
        step.prefill_rows += 1
        if next_token_ids is not None:
            step.num_scores.append(len(next_token_ids))
        step.prefill_tokens += chunk
        step.prefill_pairs += num_pairs(chunk, start)
        self._policy.on_planned(sequence, chunk, start, self._clock.now)
        target = sequence.decode_allocation
        if target is None or target is allocation:
            return
        # All blocks that are final after this step leave with it; the last one may be part full.
        end_block = -(-end // size) if last else end // size
        if end_block > sequence.num_blocks_dispatched:
            step.leaving.append(Leaving(sequence, allocation, target, sequence.num_blocks_dispatched, end_block, last))
            sequence.num_blocks_dispatched = end_block

    def _open_transfers(self, instance: InstanceHandle, step: StepBuilder) -> None:
        num_last = sum(leaving.is_last for leaving in step.leaving)
        for leaving in step.leaving:
            # The client of one last chunk waits for every millisecond; the clients of many wait for all chunks.
            groups = self._num_layer_groups(instance, leaving, _MAX_LAYER_GROUPS // num_last) if leaving.is_last else 1
            for index in range(groups):
                layers = LayerGroup(index=index, count=groups)
                blocks = leaving.first_block, leaving.end_block
                ends = leaving.allocation, leaving.target
                step.sends.append(self._transfers.open(leaving.sequence, *ends, *blocks, layers))

    def _num_layer_groups(self, instance: InstanceHandle, leaving: Leaving, max_groups: int) -> int:
        """Return in how many equal groups of layers blocks leave; each is a transfer with a cost of its own."""
        hello = instance.hello
        assert hello is not None
        if not self._layer_group_bytes:
            return 1
        num_bytes = (leaving.end_block - leaving.first_block) * hello.block_bytes
        max_groups = min(max_groups, num_bytes // self._layer_group_bytes)
        return max((count for count in range(2, max_groups + 1) if hello.num_layers % count == 0), default=1)


def _what_to_compute(sequence: Sequence, allocation: KVAllocation, min_tokens: int) -> tuple[int, int]:
    """Return the positions of a prompt that the next step may compute: the first, and the end.

    Blocks that the pool has by now, or that steps on their way to workers fill, are not computed again. All steps with
    prompts of an instance are done in the order in which they are planned, and a worker writes the KV of all rows of a
    step before it reads any, layer by layer. So this holds for blocks that another row of the same step fills, too.

    Args:
        min_tokens: how many tokens are left at least for a row that joins blocks of others.
    """
    start, size = allocation.num_planned, allocation.pool.block_size
    end = start + allocation.num_to_prefill
    first, last = -(-start // size), (end - min_tokens) // size
    if first >= last or not allocation.can_join or sequence.lacks_prompt_logprobs:
        return start, end
    joined = allocation.pool.find_joinable(sequence.hashes(size), first, last)
    if joined == first:
        return start, end
    if start % size:
        return start, first * size  # complete the block; the next step joins behind it
    return joined * size, end
