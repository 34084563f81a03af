"""Planted bugs: each one is switched on by patching the core, and the search must find it.

A search that cannot fail shows nothing. Every function here plants one bug that a person could write. `FOUND_BY` names
a seed that finds each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from hbserve.kv_cache import block_contents
from hbserve.kv_cache.block_pool import BlockPool
from hbserve.messages.client import RequestOutput
from hbserve.messages.tiers import TierResult
from hbserve.messages.transfer import TransferResult
from hbserve.messages.worker import StepLost, StepResult
from hbserve.scheduler import sequence as sequence_module
from hbserve.scheduler import transfer_tracker
from hbserve.scheduler.core_io import OutboxWriter
from hbserve.scheduler.drains import Drains
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.requests import step_results
from hbserve.scheduler.requests.lifecycle import RequestLifecycle
from hbserve.scheduler.sequence import KVAllocation, Phase, Sequence
from hbserve.scheduler.steps import step_builder, step_planner
from hbserve.scheduler.steps.decode_planner import DecodePlanner
from hbserve.scheduler.tiers.copies import Copies, KVLoad
from hbserve.scheduler.tiers.lookups import TierLookups
from hbserve.scheduler.transfer_tracker import TransferTracker
from hbserve.scheduler.worker import WorkerHandle
from hbserve.scheduler.worker_registry import WorkerRegistry
from hbserve.speculation import rounds

Patch = pytest.MonkeyPatch
PLANTED: dict[str, Callable[[Patch], None]] = {}


def _plant(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    PLANTED[function.__name__] = function
    return function


@_plant
def a_prompt_goes_on_behind_blocks_that_a_lost_worker_was_to_fill(patch: Patch) -> None:
    patch.setattr(RequestLifecycle, "_part_joined", lambda *_: None)


@_plant
def a_worker_is_not_told_of_joined_blocks(patch: Patch) -> None:
    def join(self: KVAllocation, block_hashes: list[bytes], end: int) -> None:
        known = dict(self.blocks_sent)
        original(self, block_hashes, end)
        self.blocks_sent.update(known)

    original = KVAllocation.join_blocks
    patch.setattr(KVAllocation, "join_blocks", join)


@_plant
def a_row_of_one_token_joins_what_its_step_fills(patch: Patch) -> None:
    patch.setattr(step_planner, "_MIN_JOINING", 1)


@_plant
def steps_do_not_pin(patch: Patch) -> None:
    def begin_row(self: KVAllocation, worker_id: str, keeps_state: bool) -> None:
        begin(self, worker_id, keeps_state)
        self.pool.unpin(self.owner)

    def end_row(self: KVAllocation, row: Any) -> None:
        if not row.is_void:
            self.num_inflight -= 1

    begin = KVAllocation.begin_row
    patch.setattr(KVAllocation, "begin_row", begin_row)
    patch.setattr(KVAllocation, "end_row", end_row)


@_plant
def transfers_do_not_pin(patch: Patch) -> None:
    patch.setattr(KVAllocation, "begin_transfer", lambda self: None)
    patch.setattr(KVAllocation, "end_transfer", lambda self: None)


@_plant
def blocks_are_free_one_pin_early(patch: Patch) -> None:
    def unpin(self: BlockPool, owner: str) -> None:
        holding = self._holdings.get(owner)
        if holding is None:
            return
        holding.pins -= 1
        if holding.is_freed and holding.pins <= 1:
            self.num_pending_blocks -= len(holding.block_ids)
            self._free_now(owner, holding)

    patch.setattr(BlockPool, "unpin", unpin)


@_plant
def a_worker_of_an_earlier_epoch_is_believed(patch: Patch) -> None:
    patch.setattr(WorkerHandle, "misfit", lambda *_: None)  # the numbers of its steps would tell, too

    def on_reply(self: WorkerRegistry, connection: int, reply: Any) -> None:
        found = self.connections.find(connection)
        if found is not None and isinstance(reply, (StepResult, TransferResult)):
            _, worker = found
            reply = msgspec.structs.replace(reply, epoch=worker.epoch)
        original(self, connection, reply)

    original = WorkerRegistry.on_reply
    patch.setattr(WorkerRegistry, "on_reply", on_reply)


@_plant
def an_abort_is_forgotten_while_kv_is_on_its_way(patch: Patch) -> None:
    def finish(self: RequestLifecycle, sequence: Sequence, reason: str, *others: Any) -> None:
        if reason != "abort" or sequence.phase is not Phase.TRANSFERRING:
            original(self, sequence, reason, *others)
        else:
            sequence.max_total_tokens = 10_000

    original = RequestLifecycle.finish
    patch.setattr(RequestLifecycle, "finish", finish)


@_plant
def a_retry_keeps_the_old_attempts_results(patch: Patch) -> None:
    def put_back(self: RequestLifecycle, sequence: Sequence) -> None:
        original(self, sequence)
        sequence.attempt -= 1

    original = RequestLifecycle._put_back
    patch.setattr(RequestLifecycle, "_put_back", put_back)


@_plant
def a_result_is_delivered_twice(patch: Patch) -> None:
    def push(self: OutboxWriter, client: bytes, output: RequestOutput) -> None:
        original(self, client, output)
        if output.finish_reason == "abort":
            original(self, client, output)

    original = OutboxWriter.push
    patch.setattr(OutboxWriter, "push", push)


@_plant
def the_last_waiting_result_is_left(patch: Patch) -> None:
    def confirm_steps(self: WorkerRegistry, instance: InstanceHandle) -> None:
        worker = instance.choice.next_to_confirm()
        if worker is not None:
            self._requests.on_step_done(worker, worker.results.popleft())

    patch.setattr(WorkerRegistry, "_confirm_steps", confirm_steps)


@_plant
def a_block_is_sealed_before_it_is_full(patch: Patch) -> None:
    def advance(self: RequestLifecycle, sequence: Sequence, allocation: KVAllocation, num_computed: int) -> None:
        original(self, sequence, allocation, num_computed)
        full = -(-num_computed // allocation.pool.block_size)
        hashes = sequence.hashes(allocation.pool.block_size)
        if self._shares_prefixes and allocation.num_sealed < full <= len(hashes):
            allocation.pool.seal_block(allocation.owner, full - 1, hashes[full - 1])

    original = RequestLifecycle._advance
    patch.setattr(RequestLifecycle, "_advance", advance)


@_plant
def a_prefix_hash_forgets_what_was_before_the_block(patch: Patch) -> None:
    def extend(hashes: list[bytes], token_ids: Any, block_size: int, salt: str | None = None) -> None:
        for index in range(len(hashes), len(token_ids) // block_size):
            block = token_ids[index * block_size : (index + 1) * block_size]
            alone: list[bytes] = []
            block_contents.extend_block_hashes(alone, block, block_size, salt)
            hashes += alone

    patch.setattr(sequence_module, "extend_block_hashes", extend)


@_plant
def a_slot_is_freed_by_every_instance_that_knows_the_request(patch: Patch) -> None:
    def free_slot(self: InstanceHandle, sequence: Sequence, allocation: KVAllocation) -> None:
        original(self, sequence, allocation)
        if sequence.attempt:
            self._free_slots.append(allocation.slot)

    original = InstanceHandle.free_slot
    patch.setattr(InstanceHandle, "free_slot", free_slot)


@_plant
def rows_after_a_lost_row_count(patch: Patch) -> None:
    patch.setattr(RequestLifecycle, "on_worker_lost", lambda *_: None)


@_plant
def the_steps_of_an_ended_worker_are_forgotten(patch: Patch) -> None:
    def on_steps_lost(self: RequestLifecycle, steps: Any) -> None:
        for step in steps:
            for row in step.rows:
                row.allocation.end_row(row)

    patch.setattr(RequestLifecycle, "on_steps_lost", on_steps_lost)


@_plant
def sent_is_taken_for_received(patch: Patch) -> None:
    patch.setattr(transfer_tracker, "_is_one_sided", lambda link: True)


@_plant
def a_broken_link_unpins_at_once(patch: Patch) -> None:
    def break_link(self: TransferTracker, link: Any) -> Any:
        failed = original(self, link)
        self._end_receivers(link)
        return failed

    original = TransferTracker._break
    patch.setattr(TransferTracker, "_break", break_link)


@_plant
def decoding_begins_before_the_last_transfer(patch: Patch) -> None:
    def start(self: RequestLifecycle, sequence: Sequence) -> None:
        if len(sequence.open_transfers) == 1:
            sequence.open_transfers.clear()
        original(self, sequence)

    original = RequestLifecycle._start_decoding_if_arrived
    patch.setattr(RequestLifecycle, "_start_decoding_if_arrived", start)


@_plant
def new_memory_keeps_the_old_prefix_cache(patch: Patch) -> None:
    def register(self: InstanceHandle, worker: Any, hello: Any) -> None:
        cached = dict(self.pool._block_of_hash) if hasattr(self, "pool") else {}
        original(self, worker, hello)
        for contents, block in cached.items():
            if self.pool._hash[block] is None and block in self.pool._free_blocks and not self.pool._block_of_hash:
                self.pool._free_blocks.remove(block)
                self.pool._hash[block], self.pool._block_of_hash[contents] = contents, block
                self.pool._cached[block] = None

    original = InstanceHandle.register
    patch.setattr(InstanceHandle, "register", register)


@_plant
def a_worker_gets_no_history(patch: Patch) -> None:
    def state_for(self: Sequence, allocation: KVAllocation) -> Any:
        state = original(self, allocation)
        history = None if state.history is None else state.history[: self.num_prompt_tokens]
        return msgspec.structs.replace(state, history=history)

    original = Sequence.state_for
    patch.setattr(Sequence, "state_for", state_for)


@_plant
def another_workers_state_is_taken_for_current(patch: Patch) -> None:
    def begin_row(self: KVAllocation, worker_id: str, keeps_state: bool) -> None:
        original(self, worker_id, False)

    original = KVAllocation.begin_row
    patch.setattr(KVAllocation, "begin_row", begin_row)


@_plant
def tokens_under_an_earlier_scheduler_are_forgotten(patch: Patch) -> None:
    def of_request(client: bytes, request: Any, *others: Any) -> Sequence:
        return original(client, msgspec.structs.replace(request, resumed=None), *others)

    original = Sequence.of_request
    patch.setattr(Sequence, "of_request", staticmethod(of_request))


@_plant
def no_worker_learns_of_a_lost_step(patch: Patch) -> None:
    def send(self: WorkerHandle, command: Any) -> None:
        if not isinstance(command, StepLost):
            original(self, command)

    original = WorkerHandle.send
    patch.setattr(WorkerHandle, "send", send)


@_plant
def a_decode_does_not_grow_its_table(patch: Patch) -> None:
    def grow(self: DecodePlanner, instance: InstanceHandle, sequence: Sequence, allocation: KVAllocation) -> bool:
        if allocation.pool.num_free_blocks == 1:
            return False
        return original(self, instance, sequence, allocation)

    original = DecodePlanner._grow
    patch.setattr(DecodePlanner, "_grow", grow)


@_plant
def an_activated_sequence_wakes_no_instance(patch: Patch) -> None:
    def activate(self: InstanceHandle, sequence: Sequence, allocation: KVAllocation) -> None:
        plan_at = self.plan_at
        original(self, sequence, allocation)
        self.plan_at = plan_at

    original = InstanceHandle.activate
    patch.setattr(InstanceHandle, "activate", activate)


@_plant
def an_open_link_does_not_wake_its_sender(patch: Patch) -> None:
    def on_link_opened(self: TransferTracker, target: InstanceHandle, opened: Any) -> None:
        plan_at = {link.source: link.source.plan_at for link in self._links.values()}
        original(self, target, opened)
        for instance, at in plan_at.items():
            instance.plan_at = at

    original = TransferTracker.on_link_opened
    patch.setattr(TransferTracker, "on_link_opened", on_link_opened)


@_plant
def blocks_that_a_transfer_frees_wake_no_instance(patch: Patch) -> None:
    def end_receiver(self: TransferTracker, transfer: Any) -> None:
        plan_at = transfer.link.target.plan_at
        original(self, transfer)
        transfer.link.target.plan_at = plan_at

    original = TransferTracker._end_receiver
    patch.setattr(TransferTracker, "_end_receiver", end_receiver)


@_plant
def a_late_mask_is_not_waited_for(patch: Patch) -> None:
    def wake_at(self: InstanceHandle, at: float) -> None:
        if not any(sequence.planned_from == at for sequence in self.allocations):
            original(self, at)

    original = InstanceHandle.wake_at
    patch.setattr(InstanceHandle, "wake_at", wake_at)


@_plant
def a_wrong_guess_is_accepted(patch: Patch) -> None:
    def accepted_tokens(draft: Any, sampled: Any) -> list[int]:
        accepted = original(draft, sampled)
        return list(sampled[: len(accepted) + 1])

    original = rounds.accepted_tokens
    patch.setattr(step_results, "accepted_tokens", accepted_tokens)


@_plant
def a_position_behind_a_draft_is_skipped(patch: Patch) -> None:
    def on_draft(self: RequestLifecycle, sequence: Sequence, allocation: KVAllocation, *others: Any) -> int:
        number = original(self, sequence, allocation, *others)
        allocation.num_planned += number > 2
        return number

    original = RequestLifecycle._on_draft
    patch.setattr(RequestLifecycle, "_on_draft", on_draft)


@_plant
def a_draft_has_no_blocks(patch: Patch) -> None:
    patch.setattr(DecodePlanner, "_room_for_draft", lambda self, instance, allocation, num_drafts: num_drafts)


@_plant
def a_row_follows_a_draft_whose_result_is_not_known(patch: Patch) -> None:
    def add(self: Any, sequence: Sequence, allocation: KVAllocation, *others: Any, **more: Any) -> None:
        original(self, sequence, allocation, *others, **more)
        allocation.is_drafting = False

    original = step_builder.StepBuilder.add
    patch.setattr(step_builder.StepBuilder, "add", add)


@_plant
def a_guess_that_the_draft_model_has_not_read_counts_as_read(patch: Patch) -> None:
    def on_draft(self: RequestLifecycle, sequence: Sequence, allocation: KVAllocation, *others: Any) -> int:
        number = original(self, sequence, allocation, *others)
        allocation.num_read = min(allocation.num_planned, allocation.num_read + 1)
        return number

    original = RequestLifecycle._on_draft
    patch.setattr(RequestLifecycle, "_on_draft", on_draft)


@_plant
def a_shared_block_counts_as_read_by_the_draft_model(patch: Patch) -> None:
    patch.setattr(BlockPool, "count_read", lambda self, block_ids: len(block_ids))


@_plant
def a_head_reads_guesses_with_hidden_states_of_its_own(patch: Patch) -> None:
    def on_draft(self: RequestLifecycle, sequence: Sequence, allocation: KVAllocation, *others: Any) -> int:
        number = original(self, sequence, allocation, *others)
        allocation.num_read = max(allocation.num_read, allocation.num_planned - 1)
        return number

    original = RequestLifecycle._on_draft
    patch.setattr(RequestLifecycle, "_on_draft", on_draft)


@_plant
def a_draft_takes_the_blocks_of_others(patch: Patch) -> None:
    def room(self: DecodePlanner, instance: InstanceHandle, allocation: KVAllocation, num_drafts: int) -> int:
        room = original(self, instance, allocation, num_drafts)
        if room < num_drafts and len(instance.allocations) > 1:
            other = next(other for other in instance.allocations.values() if other is not allocation)
            allocation.block_ids.append(other.block_ids[-1])
        return original(self, instance, allocation, num_drafts)

    original = DecodePlanner._room_for_draft
    patch.setattr(DecodePlanner, "_room_for_draft", room)


@_plant
def copies_of_tiers_do_not_pin(patch: Patch) -> None:
    patch.setattr(KVAllocation, "begin_copy", lambda self: None)
    patch.setattr(KVAllocation, "end_copy", lambda self: None)


@_plant
def a_block_with_a_wrong_checksum_is_used(patch: Patch) -> None:
    patch.setattr(KVLoad, "num_blocks", property(lambda self: self.first_block + len(self.sound)))


@_plant
def a_late_load_is_waited_for_no_longer_but_keeps_its_blocks(patch: Patch) -> None:
    def expire_copies(self: RequestLifecycle) -> None:
        self._lookups.expire()
        for load in self.tiers.expire():
            self._on_loaded(load)

    patch.setattr(RequestLifecycle, "expire_copies", expire_copies)


@_plant
def a_late_lookup_is_never_given_up(patch: Patch) -> None:
    patch.setattr(TierLookups, "expire", lambda self: None)


@_plant
def what_a_lookup_has_found_is_believed(patch: Patch) -> None:
    def on_result(self: Copies, worker: WorkerHandle, result: TierResult) -> KVLoad | None:
        job = self._jobs.get(result.job_id)
        if job is not None and job.load is not None and not all(entry.checksums for entry in job.entries):
            result = msgspec.structs.replace(result, failures={})
        return original(self, worker, result)

    original = Copies.on_result
    patch.setattr(Copies, "on_result", on_result)


@_plant
def the_last_layer_group_is_not_waited_for(patch: Patch) -> None:
    def open_transfer(self: TransferTracker, sequence: Sequence, *others: Any) -> Any:
        command = original(self, sequence, *others)
        if 0 < command.layers.index == command.layers.count - 1:
            sequence.open_transfers.discard(command.transfer_id)
        return command

    original = TransferTracker.open
    patch.setattr(TransferTracker, "open", open_transfer)


@_plant
def kv_that_arrives_before_its_step_has_ended_is_not_decoded(patch: Patch) -> None:
    def on_prefilled(self: RequestLifecycle, sequence: Sequence) -> None:
        self._enter(sequence, Phase.TRANSFERRING)
        sequence.prefilled_at = self._clock.now

    patch.setattr(RequestLifecycle, "_on_prefilled", on_prefilled)


@_plant
def parts_of_several_ranks_stay_unmerged(patch: Patch) -> None:
    patch.setattr(transfer_tracker, "_needs_merging", lambda link: False)


@_plant
def a_prompt_that_is_computed_again_is_scored_again(patch: Patch) -> None:
    def on_prompt_logprobs(self: RequestLifecycle, sequence: Sequence, start: int, scores: Any) -> None:
        sequence.num_scored = start
        original(self, sequence, start, scores)

    original = RequestLifecycle._on_prompt_logprobs
    patch.setattr(RequestLifecycle, "_on_prompt_logprobs", on_prompt_logprobs)


@_plant
def the_only_instance_may_be_removed_while_it_is_lost(patch: Patch) -> None:
    def why_needed(self: Drains, instance: InstanceHandle) -> str | None:
        return original(self, instance) if instance.ready else None

    original = Drains.why_needed
    patch.setattr(Drains, "why_needed", why_needed)


FOUND_BY = {
    "a_prompt_goes_on_behind_blocks_that_a_lost_worker_was_to_fill": 802,
    "a_worker_is_not_told_of_joined_blocks": 37,
    "a_row_of_one_token_joins_what_its_step_fills": 370,
    "a_late_lookup_is_never_given_up": 38,
    "what_a_lookup_has_found_is_believed": 143,
    "copies_of_tiers_do_not_pin": 14,
    "a_block_with_a_wrong_checksum_is_used": 8,
    "a_late_load_is_waited_for_no_longer_but_keeps_its_blocks": 547,
    "steps_do_not_pin": 9,
    "transfers_do_not_pin": 39,
    "blocks_are_free_one_pin_early": 7,
    "a_worker_of_an_earlier_epoch_is_believed": 137,
    "an_abort_is_forgotten_while_kv_is_on_its_way": 47,
    "a_retry_keeps_the_old_attempts_results": 8,
    "a_result_is_delivered_twice": 0,
    "the_last_waiting_result_is_left": 17,
    "a_block_is_sealed_before_it_is_full": 2,
    "a_prefix_hash_forgets_what_was_before_the_block": 151,
    "a_slot_is_freed_by_every_instance_that_knows_the_request": 0,
    "rows_after_a_lost_row_count": 129,
    "the_steps_of_an_ended_worker_are_forgotten": 29,
    "sent_is_taken_for_received": 3,
    "a_broken_link_unpins_at_once": 334,
    "decoding_begins_before_the_last_transfer": 1,
    "new_memory_keeps_the_old_prefix_cache": 0,
    "a_worker_gets_no_history": 0,
    "another_workers_state_is_taken_for_current": 116,
    "tokens_under_an_earlier_scheduler_are_forgotten": 42,
    "no_worker_learns_of_a_lost_step": 56,
    "a_decode_does_not_grow_its_table": 4,
    "an_activated_sequence_wakes_no_instance": 0,
    "an_open_link_does_not_wake_its_sender": 20,
    "blocks_that_a_transfer_frees_wake_no_instance": 54,
    "a_late_mask_is_not_waited_for": 3,
    "the_last_layer_group_is_not_waited_for": 7,
    "kv_that_arrives_before_its_step_has_ended_is_not_decoded": 20,
    "parts_of_several_ranks_stay_unmerged": 16,
    "a_prompt_that_is_computed_again_is_scored_again": 20,
    "the_only_instance_may_be_removed_while_it_is_lost": 4777,
    "a_wrong_guess_is_accepted": 0,
    "a_position_behind_a_draft_is_skipped": 3,
    "a_draft_has_no_blocks": 0,
    "a_row_follows_a_draft_whose_result_is_not_known": 3,
    "a_draft_takes_the_blocks_of_others": 40,
    "a_guess_that_the_draft_model_has_not_read_counts_as_read": 3,
    "a_shared_block_counts_as_read_by_the_draft_model": 4,
    "a_head_reads_guesses_with_hidden_states_of_its_own": 71,
}
