"""A step that is being planned: rows are added to it one by one, for the worker and for the scheduler's own records."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from hbserve.messages.transfer import SendBlocks
from hbserve.messages.worker import NO_STOP, PlanRow, SequenceState
from hbserve.policy.step_time_predictor import StepWork, keys_of_guesses
from hbserve.scheduler.sequence import InflightRow, KVAllocation, Sequence
from hbserve.scheduler.worker import WorkerHandle
from hbserve.speculation import Draft
from hbserve.speculation.measured_gain import Tried


@dataclass(frozen=True, slots=True)
class Leaving:
    """Blocks of a prompt that are final after a step, and their target; ``is_last``: the prompt is then computed."""

    sequence: Sequence
    allocation: KVAllocation
    target: KVAllocation
    first_block: int
    end_block: int
    is_last: bool


class StepBuilder:
    """A step that is being planned: what is sent, and what is kept until it is confirmed.

    Args:
        is_shared: another worker computes on the same device meanwhile.
    """

    def __init__(self, worker: WorkerHandle, is_shared: bool = False) -> None:
        self.worker = worker
        self.is_shared = is_shared
        self._worker_id = worker.id
        self.rows: list[PlanRow] = []
        self.new_sequences: list[SequenceState] = []
        self.leaving: list[Leaving] = []
        self.sends: list[SendBlocks] = []
        self.inflight: list[InflightRow] = []
        self.num_tokens = self.num_samples = self.num_drafts = self.num_to_draft = 0
        self.unread_tokens = 0
        self.rounds = 1
        self.size: tuple[int, bool] | None = None
        self.num_decoding = self.decoding_keys = 0
        self.speculates = self.has_looked = self.has_waited = self.are_promising = False
        self.gain = 0.0
        self._unread: list[int] | None = None
        self.num_scores: list[int] = []
        self.prefill_rows = 0
        self.prefill_tokens = 0
        self.prefill_pairs = 0.0
        self.decode_keys = 0.0

    @property
    def work(self) -> StepWork:
        """The work of its rows."""
        decode_rows = len(self.rows) - self.prefill_rows + self.num_drafts
        return StepWork(decode_rows, self.decode_keys, self.prefill_tokens, self.prefill_pairs, self.is_shared)

    @property
    def tried(self) -> Tried | None:
        """How its drafts were chosen; None: it has prompts, or nothing guesses the tokens of any sequence."""
        if self.prefill_rows or not self.speculates:
            return None
        assert self.size is not None, "it was set with the first decoding sequences"
        is_whole = len(self.rows) == self.num_decoding
        looked, waited = self.has_looked, self.has_waited
        return Tried(self.size, self.num_decoding, self.decoding_keys, looked, self.gain, is_whole, waited)

    def read(self, allocation: KVAllocation, token_ids: list[int]) -> None:
        """Have the draft model read these tokens of the sequence whose row is added next."""
        if token_ids:
            self._unread = token_ids
            self.unread_tokens += len(token_ids)
            allocation.num_read += len(token_ids)

    def add(
        self,
        sequence: Sequence,
        allocation: KVAllocation,
        token_ids: list[int] | None,
        num_tokens: int,
        samples: bool,
        next_token_ids: list[int] | None = None,
        draft: Draft | None = None,
    ) -> None:
        sampled_elsewhere = token_ids is None and allocation.last_worker_id != self._worker_id
        allocation.begin_row(self._worker_id, sequence.keeps_state)
        new_block_ids = self.tell(sequence, allocation)
        start = allocation.num_planned
        self.rows.append(
            PlanRow(
                slot=allocation.slot,
                start=start,
                num_tokens=num_tokens,
                token_ids=token_ids,
                new_block_ids=new_block_ids,
                sample=samples,
                sampled_elsewhere=sampled_elsewhere,
                next_token_ids=next_token_ids,
                unread=self._unread,
                unread_start=0 if self._unread is None else allocation.num_read - len(self._unread),
                ahead=draft.ahead if draft is not None and self.rounds > 1 else [],
                stop=sequence.max_total_tokens - 1 if self.rounds > 1 else NO_STOP,
            )
        )
        self._unread = None
        allocation.num_planned = end = start + num_tokens
        self.inflight.append(
            InflightRow(
                sequence, sequence.attempt, allocation, start, end, samples, next_token_ids is not None, False, draft
            )
        )
        self.num_tokens += num_tokens
        self.num_samples += samples
        if draft is not None:
            self._add_draft(allocation, len(draft.token_ids), start)

    def _add_draft(self, allocation: KVAllocation, num_drafts: int, start: int) -> None:
        """Make the last row one with a draft."""
        self.rows[-1] = msgspec.structs.replace(self.rows[-1], num_drafts=num_drafts)
        allocation.is_drafting = True
        self.num_samples += num_drafts
        self.num_drafts += num_drafts
        self.num_to_draft += self.inflight[-1].num_to_draft
        self.decode_keys += keys_of_guesses(num_drafts, start)

    def tell(self, sequence: Sequence, allocation: KVAllocation) -> list[int]:
        """Tell the worker of a sequence that it does not know; returns the new blocks that the row must name."""
        block_ids = allocation.block_ids
        num_sent = allocation.blocks_sent.get(self._worker_id)
        if num_sent == len(block_ids):
            return []
        allocation.blocks_sent[self._worker_id] = len(block_ids)
        if num_sent is None:
            self.new_sequences.append(sequence.state_for(allocation))
            return []
        return block_ids[num_sent:]
