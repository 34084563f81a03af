"""The waiting requests, and their admission: which instances each goes to, with a slot and blocks on each.

`WaitingQueue` says which request is next, `Admission` where it goes, all or nothing.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items

from hbserve.config import Config, InstanceRole
from hbserve.policy.profile_curves import ProfileCurves
from hbserve.policy.queue_policy import QueuePolicy, make_policy
from hbserve.policy.step_time_predictor import StepTimePredictor, num_pairs
from hbserve.scheduler.core_io import Clock
from hbserve.scheduler.instance import InstanceHandle, Instances
from hbserve.scheduler.sequence import InflightStep, KVAllocation, Sequence
from hbserve.scheduler.tiers.tracker import KVTiers

_MAX_ENDS = 64


# --- the queue ----------------------------------------------------------------------------------


class WaitingQueue:
    """The waiting sequences, in the order of ``scheduler.policy``.

    Args:
        curves: of the model's profile, if there is one.

    Attributes:
        waiting: the sequences; a user's policy may reorder the list, and nothing else changes it.
    """

    def __init__(self, config: Config, curves: ProfileCurves | None = None) -> None:
        self.waiting: list[Sequence] = []
        self._tokens_per_step = config.prefill_budget
        self._predictor = StepTimePredictor(curves)
        self._ends: deque[float] = deque(maxlen=_MAX_ENDS)  # when the queue began, then when requests ended
        slo = config.semi_pd.slo
        self.policy = make_policy(config.scheduler, self._predictor, None if slo is None else slo.ttft_target_ms)

    def insert(self, sequence: Sequence) -> None:
        """Insert a sequence that begins to wait."""
        self.policy.on_waiting(sequence)
        sequence.rank = self.policy.rank(sequence)
        if self.waiting and sequence.rank < self.waiting[-1].rank:
            bisect.insort(self.waiting, sequence, key=lambda other: other.rank)
        else:
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence that waits no more."""
        self.waiting.remove(sequence)

    def in_order(self, instances: Instances, now: float) -> Items[Sequence]:
        """Return the waiting sequences in the order of admission."""

        def admitted() -> tuple[list[tuple[Sequence, int]], int]:
            return _admitted(instances), max(1, len(instances.prefilling))

        return self.policy.order(self.waiting, now, admitted)

    # --- predictions -----------------------------------------------------------------------------

    def prompt_s(self, tokens: float, start: float) -> float:
        """Predict the time to compute tokens of a prompt after ``start`` others; 0: no step with prompts was seen."""
        return self._predictor.prompt_s(tokens, start)

    def on_step_done(self, step: InflightStep, busy_s: float) -> None:
        """Learn from a step with prompts how long they take."""
        if step.prefill_rows and step.work is not None:
            self._predictor.observe(step.work, busy_s)

    def on_request_ended(self, now: float) -> None:
        """A request has ended and freed its allocations."""
        self._ends.append(now)

    def on_first_waiting(self, now: float) -> None:
        """The queue is no longer empty: start to measure how fast allocations become free."""
        self._ends.clear()
        self._ends.append(now)

    def predicted_ttft_s(
        self,
        sequence: Sequence,
        instances: Instances,
        slots_are_full: bool,
        now: float,
    ) -> float:
        """Predict how long a new request would wait for its first token.

        The longer of two waits: the predicted time until the steps under way have ended, and the prompts before it and
        its own are computed; and, where requests wait for allocations, the time until as many requests have ended as
        are before it.

        Returns 0 without data or for an empty queue: a single request is never overload, and step times may be known
        for other lengths only.
        """
        rank = self.policy.rank(sequence)
        before = self.waiting[: bisect.bisect_left(self.waiting, rank, key=lambda other: other.rank)]
        num_workers = len(instances.prefilling)
        prompts = [item for item in _admitted(instances) if not item[0].is_batch or sequence.is_batch]
        starts = [(len(other.tokens), start) for other, start in prompts] + [(len(other.tokens), 0) for other in before]
        num_tokens = sum(end - start for end, start in starts)
        step_s = _until_steps_end_s(instances, now)
        if not num_workers or (not num_tokens and step_s is None):
            return 0.0
        # The instances share the prompts before it; its own is computed by one.
        pairs, own = sum(num_pairs(end - start, start) for end, start in starts), len(sequence.tokens)
        prefill_s = (step_s or 0.0) + self._predictor.queue_s(
            num_tokens / num_workers + own, pairs / num_workers + num_pairs(own, 0), self._tokens_per_step
        )
        if not slots_are_full or not before or len(self._ends) < 2:
            return prefill_s
        return max(prefill_s, (len(before) + 1) * (now - self._ends[0]) / (len(self._ends) - 1))


def _until_steps_end_s(instances: Instances, now: float) -> float | None:
    """Return the seconds until the first prefill instance has ended its steps with prompts.

    Prompts in these steps may be planned to their ends, and then no queue has them. None: an instance has no such step,
    or no instance is ready.
    """
    times_s = []
    for instance in instances.prefilling:
        busy = [w for w in instance.workers.values() if any(step.prefill_rows for step in w.inflight)]
        if not busy:
            return None
        times_s.append(max((worker.timing.expected_end() or now) - now for worker in busy))
    return max(0.0, min(times_s)) if times_s else None


def _admitted(instances: Instances) -> list[tuple[Sequence, int]]:
    """Return the prompts with an allocation, each with the tokens that are planned."""
    return [(sequence, allocation.num_planned) for sequence, allocation in instances.prompts()]


# --- admission ----------------------------------------------------------------------------------

Placement = Callable[[Sequence, Items[InstanceHandle], bool], list[InstanceHandle]]
"""Orders instances, given in the order of the configuration, for a request; the flag: to prefill it there."""


def fcfs(sequence: Sequence, instances: Items[InstanceHandle], prefills: bool) -> list[InstanceHandle]:
    """Take the first in the configuration that has room: later ones stay idle until they are needed."""
    return list(instances)


def least_loaded(sequence: Sequence, instances: Items[InstanceHandle], prefills: bool) -> list[InstanceHandle]:
    """Prefill where the fewest prompt tokens are still to be computed, decode where the fewest sequences are.

    Between instances without prompts, those with fewer sequences go first: where one worker does both phases, these
    decode, and all requests of a light load would else go to the first instance.
    """
    return sorted(instances, key=lambda instance: (_load(instance, prefills), instance.num_sequences))


def prefix_aware(sequence: Sequence, instances: Items[InstanceHandle], prefills: bool) -> list[InstanceHandle]:
    """Prefer instances that have the prompt in their prefix cache, unless too much else waits there.

    Prefill: where the fewest tokens are to be computed until the prompt is done, counting requests before it and its
    own uncached tokens. Decode: where most of its blocks are, among the instances that have at most a quarter more
    sequences than the least loaded one.
    """
    if prefills:

        def cost(instance: InstanceHandle) -> tuple[int, int]:
            return _load(instance, True) - _cached_tokens(sequence, instance), instance.num_sequences

        return sorted(instances, key=cost)
    if not instances:
        return []
    bound = 1.25 * min(_load(instance, False) for instance in instances) + 1

    def rank(instance: InstanceHandle) -> tuple[bool, int, int]:
        load = _load(instance, False)
        return load > bound, -_cached_tokens(sequence, instance), load

    return sorted(instances, key=rank)


PLACEMENTS: dict[str, Placement] = {"fcfs": fcfs, "least_loaded": least_loaded, "prefix_aware": prefix_aware}
"""Placements by their name in the configuration."""


_KEPT_FREE = 8
"""One of so many slots and blocks stays free of best-effort requests: what others need at once."""


def _leaves_room(sequence: Sequence, instance: InstanceHandle) -> bool:
    """Whether a best-effort request leaves room for others on an instance, or has it for itself."""
    if not instance.num_sequences:
        return True
    blocks, slots = instance.pool.total_blocks // _KEPT_FREE, instance.num_slots // _KEPT_FREE
    num_needed = -(-(len(sequence.tokens) + 1) // instance.pool.block_size)
    return instance.pool.num_free_blocks - num_needed >= blocks and instance.num_free_slots > slots


def _load(instance: InstanceHandle, prefills: bool) -> int:
    if not prefills:
        return instance.num_sequences
    return instance.num_tokens_to_prefill if instance.prompts else 0


def _cached_tokens(sequence: Sequence, instance: InstanceHandle) -> int:
    block_size = instance.pool.block_size
    return instance.pool.count_cached_prefix(sequence.hashes(block_size)) * block_size


_NUM_LOOKED_AT = 64
"""Waiting prompts that a new one is compared with, the last ones in the queue's order."""


def _num_equal(hashes: list[bytes], others: list[bytes]) -> int:
    """Return how many leading blocks two prompts have in common: equal hashes say that all before is equal, too."""
    if not hashes or not others or hashes[0] != others[0]:
        return 0
    ends = range(min(len(hashes), len(others)))
    return bisect.bisect_left(ends, True, key=lambda index: hashes[index] != others[index])


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
        self._local_prefill_tokens = config.kv_transfer.local_prefill_tokens
        self._headroom_tokens = config.performance.decode_headroom_tokens
        # Prompt tokens in the next step: of all prompts, and of one.
        self._enough_tokens, self._max_tokens_of_one = config.prefill_budget, config.max_chunk
        self._policy = policy
        self.is_full = False

    def count_cached_tokens(self, sequence: Sequence) -> int:
        """Count the tokens of a prompt that an instance which prefills has in its prefix cache now, at most."""
        counts = (_cached_tokens(sequence, instance) for instance in self._instances.prefilling)
        return min(max(counts, default=0), len(sequence.tokens) - 1)

    def find_alike(self, sequence: Sequence, waiting: Items[Sequence]) -> tuple[Sequence | None, int]:
        """Find the earlier prompt, among those not computed yet, that has the longest beginning in common with one.

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
            for other in (*(admitted for admitted, _ in self._instances.prompts()), *waiting[-_NUM_LOOKED_AT:])
            if other.arrival < sequence.arrival and (sequence.is_batch or not other.is_batch)
        ]
        lengths = [_num_equal(hashes, other.hashes(block_size)) for other in others]
        longest = max(lengths, default=0)
        if not longest:
            return None, 0
        return others[lengths.index(longest)], min(longest * block_size, len(sequence.tokens) - 1)

    def allocate(self, sequence: Sequence) -> bool:
        """Allocate slots and blocks for prefill and decode, in the order of the placement; False if nothing fits now.

        An instance that has enough prompts to fill its next step is given no more, unless the new prompt would be
        computed before one of those. A request that waits without an allocation holds no blocks and can be overtaken.
        """
        instances = [
            instance for instance in self._instances.ready if instance.num_free_slots and not instance.is_draining
        ]
        if self._policy.gives_way(sequence, self._clock.now):
            instances = [instance for instance in instances if _leaves_room(sequence, instance)]
        prefilling = [instance for instance in instances if instance.role.prefills]
        hungry = [instance for instance in prefilling if not self._has_enough(instance, sequence)]
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
            stored_runs=self._tiers.find(instance, hashes, num_cached) if prefills else [],
        )
        if instance.has_eagle_head:
            runs = allocation.stored_runs
            allocation.note_foreign(runs[0].first if runs else 0, runs[-1].end if runs else 0)
        return allocation

    def _prefix_hashes(self, sequence: Sequence, instance: InstanceHandle, prefills: bool) -> list[bytes]:
        """Return the hashes of the blocks that may come from the cache, and update the pool's headroom for decode.

        An instance that prefills must compute the last token, or there are no logits to sample from. Likewise it must
        compute every prompt token before one whose log-probabilities the client still waits for.
        """
        pool = instance.pool
        decodes = instance.role.decodes or instance.choice.finishes_decodes
        num_running = instance.num_sequences if decodes else 0
        pool.decode_headroom_blocks = num_running * -(-self._headroom_tokens // pool.block_size)
        usable_tokens = len(sequence.tokens) - 1 if prefills else len(sequence.tokens)
        if prefills and sequence.lacks_prompt_logprobs:
            usable_tokens = sequence.num_scored
        return sequence.hashes(pool.block_size)[: usable_tokens // pool.block_size]

    def _start_prefill(
        self, sequence: Sequence, allocation: KVAllocation, decode_allocation: KVAllocation | None
    ) -> bool:
        sequence.prefill_allocation, sequence.decode_allocation = allocation, decode_allocation
        instance = self._instances[allocation.instance_id]
        if allocation.stored_runs:
            allocation.load_start = allocation.stored_runs[0].first * allocation.pool.block_size
        if allocation.load_start == allocation.num_planned:
            instance.reserve(sequence, allocation)  # in no plan until they are loaded
        else:
            instance.activate(sequence, allocation)
        if decode_allocation is not None and decode_allocation is not allocation:
            target = self._instances[decode_allocation.instance_id]
            target.reserve(sequence, decode_allocation)
            sequence.num_blocks_dispatched = decode_allocation.num_computed // decode_allocation.pool.block_size
            decode_allocation.num_planned = decode_allocation.num_tokens_at_entry
            if target.has_eagle_head:
                end_block = -(-decode_allocation.num_tokens_at_entry // decode_allocation.pool.block_size)
                decode_allocation.note_foreign(sequence.num_blocks_dispatched, end_block)
        return True
