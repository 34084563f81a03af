"""What workers' results add to a request: KV that is there, tokens, and the way from prefill to decode."""

from __future__ import annotations

import logging
from itertools import islice

import msgspec

from hbserve.messages.base import TokenLogprobs
from hbserve.messages.client import RequestOutput
from hbserve.messages.worker import NO_TOKEN, StepResult
from hbserve.scheduler.requests.phases import RequestPhases
from hbserve.scheduler.sequence import InflightRow, KVAllocation, Phase, Sequence
from hbserve.scheduler.worker import WorkerHandle
from hbserve.speculation import Draft, PredictionDrafter
from hbserve.speculation.drafters import EAGLE3
from hbserve.speculation.rounds import accepted_tokens

logger = logging.getLogger(__name__)

_MASK_DELAY_S = 0.01
_MAX_MASK_DELAY_S = 0.16
_MAX_LOADS = 3
"""Loads of a prompt, each from what the one before could not bring: as many as there are kinds of tiers."""
_TOKENS_TO_FORGIVE = 16
"""Tokens after which a failed attempt no longer counts. A request that kills workers gets one token at most, from
its prefill."""


class StepResults(RequestPhases):
    """Takes the results of steps. Base of `RequestLifecycle`."""

    def on_step_done(self, worker: WorkerHandle, result: StepResult) -> None:
        """Take the result of a worker's oldest step in flight: more KV is computed, and there may be tokens."""
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
        is_predicted, num_wrong = draft.drafter == PredictionDrafter.name, len(draft.token_ids) - num_accepted
        for index, token in enumerate(token_ids):
            self._advance(sequence, allocation, row.start + index + 1)
            # Each token has its own count: behind the end of the output, right guesses are none of the client's.
            is_right = index < num_accepted
            predicted = (int(is_right), 0 if is_right else num_wrong) if is_predicted and draft.token_ids else None
            self._on_token(sequence, allocation, token, logprobs[index] if logprobs else None, predicted)
            if sequence.phase is Phase.FINISHED:
                return index + 1
        return len(token_ids)

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

    # --- KV that is there ----------------------------------------------------------------------------

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
            self.tiers.offer(instance, hashes[allocation.num_sealed : full])
            allocation.num_sealed = full

    def _join_load(self, sequence: Sequence, allocation: KVAllocation) -> None:
        """Go on behind a load if it has ended and all before it is computed.

        What is not intact is loaded from another tier, or computed.
        """
        start, end = allocation.load_start, allocation.loaded_end
        if start is None or end is None or allocation.num_computed < start:
            return
        allocation.load_start = allocation.loaded_end = None
        if end > start:
            self._advance(sequence, allocation, end)
            allocation.num_planned = end
        instance = self._instances[allocation.instance_id]
        may_load = allocation.is_load_short and allocation.num_loads < _MAX_LOADS
        if may_load and self._admission.find_again(sequence, allocation):
            self.tiers.begin_load(instance, sequence, allocation)
        instance.activate_until_load(sequence, allocation)

    def _on_joined(self, sequence: Sequence, row: InflightRow) -> None:
        """A row has been computed behind blocks that were computed for others."""
        self._count_cached(sequence, min(row.start, sequence.num_prompt_tokens) - (row.start - row.num_joined))
        logger.debug("request %s: joined others up to token %d", sequence.id, row.start)

    def _count_cached(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that more of a prompt has come from others than there was at its admission."""
        if num_tokens > 0 and sequence.first_token_time is None:
            self._note_cached(sequence, (sequence.num_cached_tokens or 0) + num_tokens)
            self._metrics.on_cached(sequence)

    def _note_cached(self, sequence: Sequence, num_tokens: int) -> None:
        """Note how much of a prompt this attempt need not compute; the count has the most of all attempts."""
        sequence.num_cached_tokens = num_tokens
        self.counts["cached_prompt_tokens"] += max(0, num_tokens - sequence.max_cached_tokens)
        sequence.max_cached_tokens = max(num_tokens, sequence.max_cached_tokens)

    # --- prefilling -> transferring -> decoding ------------------------------------------------------

    def _on_prefilled(self, sequence: Sequence) -> None:
        """The prompt is computed; transfers pin its blocks here until they have arrived at the decode instance."""
        self._enter(sequence, Phase.TRANSFERRING)
        sequence.prefilled_at = self._clock.now
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
