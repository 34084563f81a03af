"""The decoding sequences of a step: which are in it, with which drafts, and how many rounds it does."""

from __future__ import annotations

import functools
from collections.abc import Callable

from hbserve.config import MAX_DRAFT_TOKENS, Config
from hbserve.policy.step_time_predictor import StepWork
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import KVAllocation, Sequence
from hbserve.scheduler.steps.step_builder import StepBuilder
from hbserve.speculation import Draft
from hbserve.speculation.choice import Candidate, Way, can_gain, choose
from hbserve.speculation.measured_gain import GainMeter
from hbserve.speculation.rounds import MAX_ROUNDS
from hbserve.speculation.speculator import Record

_MIN_ROUND_S = 0.1e-3
"""Time that a round takes at least, for the number of rounds."""
_MAX_UNREAD_TOKENS = 2048
"""Tokens that the draft model reads in a step, of all sequences: of a prompt, about a tenth would take as long."""
_SHORT_READ, _MAX_READ_PER_TOKEN = 16, 16
"""Tokens that the draft model always reads, and how many more for each token that is left of a sequence's output."""
_MAX_READ_IN_STEP = 2048
"""Tokens that the drafters of a step take into their indexes, in about a millisecond. Others wait for the next look."""
_MAX_LEFT_OUT = 0.1
"""Part of the decoding sequences that a step with prompts may leave out while their drafts are verified. The wait for
their results costs a gap; a step without them costs each of them the time of a step with prompts."""
_NO_DRAFT = Draft([], "", Record())
Allocations = list[tuple[Sequence, KVAllocation]]


class DecodePlanner:
    """Plans the rows of decoding sequences.

    Args:
        preempt: puts a sequence back to waiting, because an older one needs its blocks.
    """

    def __init__(self, config: Config, preempt: Callable[[Sequence], None]) -> None:
        self._max_num_batched_tokens = config.performance.max_num_batched_tokens
        self._max_rows = config.performance.max_num_seqs
        self._preempt = preempt

    def plan(
        self,
        step: StepBuilder,
        instance: InstanceHandle,
        allocations: Allocations,
        max_rows: int | None = None,
        may_draft: bool = True,
        max_rounds_s: float = 0.0,
    ) -> bool:
        """Plan the decoding sequences; False: none of them may be in a step before a result is known.

        Args:
            max_rounds_s: how long all rounds of the step together may take.
        """
        decoding = self.decoding(step, instance, allocations)[:max_rows]
        step.num_decoding += len(decoding)
        if step.size is None:
            step.size = GainMeter.size_of(len(decoding), step.is_shared)
        speculating = [item for item in decoding if item[0].speculator is not None]
        drafts: dict[Sequence, Draft | None] | None = {}
        step.decoding_keys += sum([allocation.num_planned for _, allocation in decoding])
        if speculating:
            step.speculates = True
            drafts = (
                self._choose_drafts(step, instance, decoding, speculating, max_rounds_s)
                if may_draft
                else _not_without(decoding)
            )
        if drafts is None:
            return False
        step.has_waited, step.worker.waits_for_drafts = step.worker.waits_for_drafts, False
        step.worker.looks.on_planned(step.has_looked, bool(drafts), step.are_promising)
        if step.rounds > 1:
            step.rounds = self._rounds(instance, decoding, drafts, step.rounds)
        for sequence, allocation in decoding:
            if step.num_tokens >= self._max_num_batched_tokens:
                break
            if not drafts:
                self._plan_decode(step, instance, sequence, allocation)
            elif (draft := drafts.get(sequence, _NO_DRAFT)) is not None:
                self._plan_decode(step, instance, sequence, allocation, draft)
        return True

    def decoding(self, step: StepBuilder, instance: InstanceHandle, allocations: Allocations) -> Allocations:
        """Return the sequences that the step's worker may decode."""
        worker, can_take = step.worker, instance.choice.can_take
        return [
            (sequence, allocation)
            for sequence, allocation in allocations
            if allocation.num_planned >= allocation.num_tokens_at_entry
            and sequence.decode_allocation is allocation
            and (allocation.last_worker_id == worker.id or can_take(worker, allocation))
        ]

    def _choose_drafts(
        self,
        step: StepBuilder,
        instance: InstanceHandle,
        decoding: Allocations,
        speculating: Allocations,
        max_rounds_s: float,
    ) -> dict[Sequence, Draft | None] | None:
        """Choose which sequences get a draft in this step, and which wait for one.

        Args:
            speculating: those of the decoding sequences that have a speculator.

        Returns:
            Its draft for each sequence that gets one, and None for each that is left out until its last token is known.
            None instead: the whole step waits for a result.
        """
        max_rows = min(self._max_rows, self._max_num_batched_tokens) - step.num_tokens - len(decoding)
        if max_rows <= 0:
            return {}
        assert step.size is not None, "the step knows of its decoding sequences"
        looks, worker = step.worker.looks, step.worker
        if not looks.is_due(len(speculating)) or not worker.gain.may_look(step.size):
            return {}
        step.has_looked = True
        keys = sum([allocation.num_planned for _, allocation in decoding])
        work, timing = StepWork(len(decoding), keys), worker.timing
        sample = looks.sample(speculating)
        if len(sample) < len(speculating):
            seen, _ = self._candidates(instance, sample)
            share = len(speculating) / len(decoding)
            if not can_gain(seen, len(sample), share, work, timing.predictor, timing.gap_s) or not looks.may_see_all():
                return {}
        candidates, sequences = self._candidates(instance, speculating)
        if not candidates:
            return {}
        gap_s, rounds = timing.gap_s, 1
        if max_rounds_s:  # a step that waits for every result may do several rounds
            rounds = int(max_rounds_s / max(timing.predictor.seconds(work), _MIN_ROUND_S))
            trusted = sum(candidate.draft.record.max_rounds for candidate in candidates) // len(candidates)
            rounds = max(1, min(rounds, MAX_ROUNDS, trusted))
            gap_s = (gap_s + (rounds - 1) * timing.round_gap_s) / rounds
        goes_on = not looks.num_undrafted
        choice = choose(candidates, work, timing.predictor, gap_s, max_rows, timing.draft_s, timing.read_s, goes_on)
        way, lengths = choice.way, choice.lengths
        step.are_promising = way is not Way.PLAIN
        if way is Way.PLAIN or not step.worker.gain.permits(step.size, choice.gain):
            return {}
        step.gain = max(step.gain, choice.gain)
        are_known = all(allocation.num_planned < len(sequence.tokens) for sequence, allocation in decoding)
        if way is Way.WHOLE and are_known and not step.worker.inflight:
            step.rounds = rounds
        drafts: dict[Sequence, Draft | None] = {}
        for sequence, candidate, length in zip(sequences, candidates, lengths, strict=True):
            if length and not candidate.is_known:
                if way is Way.WHOLE:
                    worker.waits_for_drafts = True
                    return None
                drafts[sequence] = None
            elif length:
                drafts[sequence] = candidate.draft.first(length)
        return drafts

    def _candidates(self, instance: InstanceHandle, speculating: Allocations) -> tuple[list[Candidate], list[Sequence]]:
        """Return the sequences that have a guess; where drafters have much to read, not all are asked."""
        candidates, sequences, num_to_read = [], [], 0
        usually_unread = MAX_DRAFT_TOKENS if instance.has_eagle_head else 1  # after a draft
        for sequence, allocation in speculating:
            assert sequence.speculator is not None
            position, tokens = allocation.num_planned, sequence.tokens
            to_read = sequence.speculator.num_to_read(tokens)
            if num_to_read and num_to_read + to_read > _MAX_READ_IN_STEP:
                continue
            num_to_read += to_read
            draft = sequence.speculator.draft(tokens, sequence.max_total_tokens - position - 2)
            if draft is not None and draft.num_to_draft and not _pays_to_read(sequence, allocation):
                draft = None
            if draft is not None:
                judge = functools.partial(instance.choice.is_late, sequence, allocation)
                is_late = sequence.speculator.judge(len(tokens), judge)
                must_read = draft.num_to_draft > 0 and position - allocation.num_read > usually_unread
                candidates.append(Candidate(draft, position, position < len(tokens), is_late, must_read))
                sequences.append(sequence)
        return candidates, sequences

    def _rounds(
        self, instance: InstanceHandle, decoding: Allocations, drafts: dict[Sequence, Draft | None], rounds: int
    ) -> int:
        """Return how many rounds a step does, at most ``rounds``, and allocate blocks for them.

        The guesses of most sequences should last. A sequence without guesses, or whose output has ended, is still in
        the step.
        """
        lasting = [
            1 + len(draft.ahead) // len(draft.token_ids)
            for draft in drafts.values()
            if draft is not None and not draft.num_to_draft
        ]
        if lasting:
            rounds = min(rounds, sum(lasting) // len(lasting))
        for sequence, allocation in decoding:
            if rounds <= 1:
                return 1
            rounds = self._max_rounds(instance, sequence, allocation, rounds, drafts.get(sequence))
        return rounds

    def _max_rounds(
        self,
        instance: InstanceHandle,
        sequence: Sequence,
        allocation: KVAllocation,
        rounds: int,
        draft: Draft | None,
    ) -> int:
        """Return how many rounds a sequence can do at most, and allocate blocks for them."""
        position, length = allocation.num_planned, 1 if draft is None else 1 + len(draft.token_ids)
        if sequence.has_grammar:  # whether a mask is late is known to each rank alone, and all must do the same rounds
            return 1
        if draft is not None and draft.num_to_draft and position - allocation.num_read > MAX_DRAFT_TOKENS:
            return 1  # the draft model reads first
        if allocation.lacks_block:
            return 1
        # the last round that counts starts before the end of the output, and computes as much as all others
        longest = sequence.max_total_tokens - 2 - position + length
        assert instance.hello is not None, "an instance that has allocations is known"
        if position + longest > instance.hello.max_model_len:
            rounds, longest = min(rounds, (sequence.max_total_tokens - 1 - position) // length), rounds * length
        needed = min(rounds * length, longest)
        room = 1 + self._room_for_draft(instance, allocation, needed - 1)
        return rounds if room == needed else max(1, room // length)

    def _plan_decode(
        self,
        step: StepBuilder,
        instance: InstanceHandle,
        sequence: Sequence,
        allocation: KVAllocation,
        draft: Draft = _NO_DRAFT,
    ) -> None:
        position = allocation.num_planned
        if position + 1 >= sequence.max_total_tokens or sequence not in instance.allocations:
            return
        known = position < len(sequence.tokens)
        if not known and (sequence.has_grammar or allocation.is_drafting):
            return  # the unknown token decides which tokens may come next, or where the next row starts
        if allocation.lacks_block and not self._grow(instance, sequence, allocation):
            return
        if draft.num_to_draft:
            draft = self._read(step, sequence, allocation, draft)
        if draft is not _NO_DRAFT and (room := self._room_for_draft(instance, allocation, len(draft.token_ids))):
            draft = draft.first(room)
            token_ids = [sequence.tokens[position], *draft.token_ids]
            step.add(sequence, allocation, token_ids, len(token_ids), samples=True, draft=draft)
        else:
            last = [sequence.tokens[position]] if known else None
            step.add(sequence, allocation, last, 1, samples=True, draft=_NO_DRAFT if step.rounds > 1 else None)
        step.decode_keys += position

    def _read(self, step: StepBuilder, sequence: Sequence, allocation: KVAllocation, draft: Draft) -> Draft:
        """Have the draft model read what it has not, as far as the step has time for it; returns no draft if tokens
        are left."""
        end = allocation.num_planned
        num_tokens = min(end - allocation.num_read, _MAX_UNREAD_TOKENS - step.unread_tokens)
        step.read(allocation, sequence.tokens[allocation.num_read : allocation.num_read + num_tokens])
        return draft if allocation.num_read == end else _NO_DRAFT

    def _room_for_draft(self, instance: InstanceHandle, allocation: KVAllocation, num_drafts: int) -> int:
        """Return how many draft tokens have a place in blocks; a draft takes blocks only if others do not need them."""
        pool, owner, block_ids = allocation.pool, allocation.owner, allocation.block_ids
        first = allocation.num_planned + 1
        missing = -(-(first + num_drafts) // pool.block_size) - len(block_ids)
        if missing > 0 and pool.num_free_blocks >= missing + len(instance.allocations) + len(instance.reserved):
            pool.allocate_blocks(owner, missing)
        return min(num_drafts, len(block_ids) * pool.block_size - first)

    def _grow(self, instance: InstanceHandle, sequence: Sequence, allocation: KVAllocation) -> bool:
        """Allocate one more block for a decode; preempts best-effort and younger sequences if the pool has none."""
        while allocation.pool.allocate_blocks(allocation.owner, 1) is None:
            if allocation.pool.num_pending_blocks:
                return False  # blocks will be freed when their pins are dropped: sit this step out
            victim = max(instance.allocations, key=lambda admitted: (admitted.is_batch, admitted.arrival))
            if victim is sequence and instance.reserved:
                return False  # sequences that are about to arrive here hold the blocks; they can be preempted then
            self._preempt(victim)
            if victim is sequence:
                return False
        return True


def _not_without(decoding: Allocations) -> dict[Sequence, Draft | None] | None:
    """Return no drafts; None if many sequences are verifying drafts: a long step with prompts should have them, too."""
    num_waiting = sum(allocation.is_drafting for _, allocation in decoding)
    return None if num_waiting > _MAX_LEFT_OUT * len(decoding) else {}


def _pays_to_read(sequence: Sequence, allocation: KVAllocation) -> bool:
    """Whether a sequence has enough tokens left to be worth what the draft model must read of it first."""
    unread = allocation.num_planned - allocation.num_read
    left = sequence.max_total_tokens - allocation.num_planned
    return unread <= _SHORT_READ or left >= max(_SHORT_READ, unread / _MAX_READ_PER_TOKEN)
