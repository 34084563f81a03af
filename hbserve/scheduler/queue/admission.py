"""Admission: which instances a waiting request goes to, with a slot and blocks on each, all or nothing."""

from __future__ import annotations

from collections.abc import Callable

from hbserve.config import Config, InstanceRole
from hbserve.policy.queue_policy import QueuePolicy
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle, Instances
from hbserve.scheduler.queue.placement import PLACEMENTS, cached_tokens, num_equal, prefix_aware, present_tokens
from hbserve.scheduler.sequence import KVAllocation, Sequence
from hbserve.scheduler.tiers.tracker import KVTiers

_KEPT_FREE = 8
"""One of so many slots and blocks stays free of best-effort requests: what others need at once."""


class Admission:
    """Gives requests their allocations, for prefill and decode together: a computed prompt always has a place to go to.

    Args:
        policy: says which prompt goes first.
        can_send: whether KV can go from one instance to another, by their ids.
        tiers: asked what of a prompt can be loaded.

    Attributes:
        is_full: the last request found no slot or too few blocks.
    """

    def __init__(
        self,
        instances: Instances,
        config: Config,
        clock: Clock,
        policy: QueuePolicy,
        can_send: Callable[[str, str], bool],
        tiers: KVTiers,
    ) -> None:
        self._placement = PLACEMENTS[config.performance.placement]
        self._instances = instances
        self._clock = clock
        self._can_send = can_send
        self._tiers = tiers
        self._shares_prefixes = config.performance.enable_prefix_caching
        self._favours_prefixes = self._shares_prefixes and self._placement is prefix_aware
        self._local_prefill_tokens = config.kv_transfer.local_prefill_tokens
        self._headroom_tokens = config.performance.decode_headroom_tokens
        # Prompt tokens in the next step: of all prompts, and of one.
        self._enough_tokens, self._max_tokens_of_one = config.prefill_budget, config.max_chunk
        self._policy = policy
        self.is_full = False

    def count_cached_tokens(self, sequence: Sequence) -> int:
        """Count the tokens of a prompt that an instance which prefills has in its prefix cache now, at most."""
        counts = (cached_tokens(sequence, instance) for instance in self._instances.prefilling)
        return min(max(counts, default=0), len(sequence.tokens) - 1)

    def find_alike(self, sequence: Sequence) -> tuple[Sequence | None, int]:
        """Find the earlier prompt, among those being computed, that has the longest beginning in common with one.

        Returns:
            It, and the tokens that both have, in whole blocks; None and 0: none has one.
        """
        prefilling = self._instances.prefilling
        if not self._shares_prefixes or not prefilling or sequence.lacks_prompt_logprobs:
            return None, 0
        block_size = prefilling[0].pool.block_size  # that of all instances
        hashes = sequence.hashes(block_size)
        others = [
            other
            for other, _ in self._instances.prompts()
            if other.arrival < sequence.arrival and (sequence.is_batch or not other.is_batch)
        ]
        lengths = [num_equal(hashes, other.hashes(block_size)) for other in others]
        longest = max(lengths, default=0)
        if not longest:
            return None, 0
        return others[lengths.index(longest)], min(longest * block_size, len(sequence.tokens) - 1)

    def allocate(self, sequence: Sequence) -> bool:
        """Allocate slots and blocks for prefill and decode, in the order of the placement; False if nothing fits now.

        An instance that has enough prompts to fill its next step is given no more, unless the new prompt would be
        computed before one of those. If the placement favours prefixes and there are several instances, there is one
        more exception: the instance has or computes most of the prompt, which another one would compute again. A
        request that waits without an allocation holds no blocks and can be overtaken.
        """
        instances = [
            instance for instance in self._instances.ready if instance.num_free_slots and not instance.is_draining
        ]
        if self._policy.gives_way(sequence, self._clock.now):
            instances = [instance for instance in instances if _leaves_room(sequence, instance)]
        prefilling = [instance for instance in instances if instance.role.prefills]
        has_choice = self._favours_prefixes and len(prefilling) > 1
        hungry = [
            instance
            for instance in prefilling
            if not self._has_enough(instance, sequence) or (has_choice and _has_most(instance, sequence))
        ]
        self.is_full = False
        decode_instances = [instance for instance in instances if not instance.role.prefills]
        decode_instances = self._placement(sequence, decode_instances, False)
        if self._allocate_where_it_decodes(sequence, decode_instances):
            return True
        num_tokens = len(sequence.tokens)
        is_last = num_tokens + 1 == sequence.max_total_tokens  # one token to go: prefill gives it, and it has no KV
        for prefill_instance in self._placement(sequence, hungry, True):
            if prefill_instance.role.decodes:
                allocation = self._allocate(sequence, prefill_instance, num_tokens + (not is_last))
                if allocation is not None:
                    return self._start_prefill(sequence, allocation, allocation)
            elif is_last:
                allocation = self._allocate(sequence, prefill_instance, num_tokens)
                if allocation is not None:
                    return self._start_prefill(sequence, allocation, None)
            elif self._fits(sequence, prefill_instance, num_tokens):
                for decode_instance in decode_instances:
                    if self._can_send(prefill_instance.id, decode_instance.id):
                        decode_allocation = self._allocate(sequence, decode_instance, num_tokens + 1)
                        if decode_allocation is not None:
                            allocation = self._allocate(sequence, prefill_instance, num_tokens)
                            assert allocation is not None, "what fits can be allocated"
                            return self._start_prefill(sequence, allocation, decode_allocation)
        self.is_full = bool(hungry) or not prefilling
        return False

    def _allocate_where_it_decodes(self, sequence: Sequence, decode_instances: list[InstanceHandle]) -> bool:
        """Prefill on the decode instance if only a few prompt tokens are uncached; this avoids the KV transfer."""
        num_tokens = len(sequence.tokens)
        for instance in decode_instances if self._local_prefill_tokens else ():
            block_size = instance.pool.block_size
            hashes = self._prefix_hashes(sequence, instance, prefills=True)
            num_cached = instance.pool.count_cached_prefix(hashes)
            num_cached += sum(len(run.entries) for run in self._tiers.find(instance, hashes, num_cached))
            uncached = num_tokens - num_cached * block_size
            if uncached <= self._local_prefill_tokens:
                num_positions = min(num_tokens + 1, sequence.max_total_tokens - 1)  # the last token has no KV
                allocation = self._allocate(sequence, instance, num_positions, prefills=True)
                if allocation is not None:
                    return self._start_prefill(sequence, allocation, allocation)
        return False

    def _has_enough(self, instance: InstanceHandle, sequence: Sequence) -> bool:
        prompts = instance.prompts
        if not prompts:
            return False
        num_tokens, now = 0, self._clock.now
        key = self._policy.key(sequence, 0, now)
        for admitted, allocation in prompts:
            if self._policy.key(admitted, allocation.num_planned, now) > key:
                return False
            num_tokens += min(allocation.num_to_prefill, self._max_tokens_of_one)
        return num_tokens >= min(self._enough_tokens, instance.choice.tokens_per_step)

    def _fits(self, sequence: Sequence, instance: InstanceHandle, num_positions: int) -> bool:
        """Whether `_allocate` would succeed."""
        hashes = self._prefix_hashes(sequence, instance, instance.role.prefills)
        num_blocks = -(-num_positions // instance.pool.block_size)
        return instance.pool.can_allocate(num_blocks, InstanceRole.PREFILL, hashes)

    def _allocate(
        self, sequence: Sequence, instance: InstanceHandle, num_positions: int, prefills: bool | None = None
    ) -> KVAllocation | None:
        """Take a slot and blocks for ``num_positions``, with cached prefix blocks shared; None if too few are free.

        Args:
            prefills: whether the prompt is computed on the instance; default: by the instance's role.
        """
        pool = instance.pool
        prefills = instance.role.prefills if prefills is None else prefills
        hashes = self._prefix_hashes(sequence, instance, prefills)
        num_cached = pool.count_cached_prefix(hashes)
        owner = f"{sequence.arrival}.{sequence.attempt}"
        num_blocks = -(-num_positions // pool.block_size)
        if pool.allocate_blocks(owner, num_blocks, InstanceRole.PREFILL, hashes) is None:
            return None
        block_ids = pool.get_block_ids(owner)
        allocation = KVAllocation(
            instance_id=instance.id,
            epoch=instance.arena_epoch,
            pool=pool,
            owner=owner,
            block_ids=block_ids,
            slot=instance.take_slot(),
            num_tokens_at_entry=len(sequence.tokens),
            num_planned=num_cached * pool.block_size,
            num_computed=num_cached * pool.block_size,
            num_sealed=num_cached,
            num_read=pool.count_read(block_ids[:num_cached]) * pool.block_size,
        )
        if prefills:
            allocation.plan_load(self._tiers.find(instance, hashes, num_cached))
        return allocation

    def find_again(self, sequence: Sequence, allocation: KVAllocation) -> bool:
        """Plan a load of what tiers have behind the computed part of a prompt; False: computing it is sooner."""
        instance = self._instances[allocation.instance_id]
        hashes = self._prefix_hashes(sequence, instance, prefills=True)
        num_blocks = allocation.num_computed // allocation.pool.block_size
        allocation.plan_load(self._tiers.find(instance, hashes, num_blocks))
        return bool(allocation.stored_runs)

    def _prefix_hashes(self, sequence: Sequence, instance: InstanceHandle, prefills: bool) -> list[bytes]:
        """Return the hashes of the blocks that may come from the cache, and update the pool's headroom for decode.

        An instance that prefills must compute the last token, or there are no logits to sample from. Likewise it must
        compute every prompt token before one whose log-probabilities the client still waits for.
        """
        pool = instance.pool
        decodes = instance.role.decodes or instance.choice.finishes_decodes
        num_running = instance.num_sequences if decodes else 0
        headroom = num_running * -(-self._headroom_tokens // pool.block_size)
        # Even without headroom, a new request must not take the block that a running sequence waits for: that one
        # would preempt it, and wait for the block again while a copy from a tier pins it.
        pool.decode_headroom_blocks = headroom or instance.num_short_of_a_block
        usable_tokens = len(sequence.tokens) - 1 if prefills else len(sequence.tokens)
        if prefills and sequence.lacks_prompt_logprobs:
            usable_tokens = sequence.num_scored
        return sequence.hashes(pool.block_size)[: usable_tokens // pool.block_size]

    def _start_prefill(
        self, sequence: Sequence, allocation: KVAllocation, decode_allocation: KVAllocation | None
    ) -> bool:
        sequence.prefill_allocation, sequence.decode_allocation = allocation, decode_allocation
        instance = self._instances[allocation.instance_id]
        instance.activate_until_load(sequence, allocation)
        if decode_allocation is not None and decode_allocation is not allocation:
            target = self._instances[decode_allocation.instance_id]
            target.reserve(sequence, decode_allocation)
            sequence.num_blocks_dispatched = decode_allocation.num_computed // decode_allocation.pool.block_size
            decode_allocation.num_planned = decode_allocation.num_tokens_at_entry
        return True


def _has_most(instance: InstanceHandle, sequence: Sequence) -> bool:
    return 2 * present_tokens(sequence, instance) >= len(sequence.tokens)


def _leaves_room(sequence: Sequence, instance: InstanceHandle) -> bool:
    """Whether a best-effort request leaves room for others on an instance, or has it for itself."""
    if not instance.num_sequences:
        return True
    blocks, slots = instance.pool.total_blocks // _KEPT_FREE, instance.num_slots // _KEPT_FREE
    num_needed = -(-(len(sequence.tokens) + 1) // instance.pool.block_size)
    return instance.pool.num_free_blocks - num_needed >= blocks and instance.num_free_slots > slots
