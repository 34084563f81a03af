"""Where a waiting request may go: workers, slots and blocks, all or none.

Which of several workers a request goes to: the order in which admission tries them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as List

from hbserve.config import Config, InstanceRole
from hbserve.policy.queue_policy import QueuePolicy
from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import Seat, Sequence
from hbserve.scheduler.waiting_queue import prefill_budget

Placement = Callable[[Sequence, List[InstanceHandle], bool], list[InstanceHandle]]
"""From a request, workers in the order of the configuration, and whether it is to be prefilled there."""


def fcfs(sequence: Sequence, workers: List[InstanceHandle], prefills: bool) -> list[InstanceHandle]:
    """The first in the configuration that has room: later ones stay idle until they are needed."""
    return list(workers)


def least_loaded(sequence: Sequence, workers: List[InstanceHandle], prefills: bool) -> list[InstanceHandle]:
    """Prefill where the fewest prompt tokens are still to be computed, decode where the fewest sequences are."""
    return sorted(workers, key=lambda worker: _load(worker, prefills))


def prefix_aware(sequence: Sequence, workers: List[InstanceHandle], prefills: bool) -> list[InstanceHandle]:
    """Where the most of the prompt is in the prefix cache, unless too much else waits there.

    Prefill: where the fewest tokens are to be computed until the prompt is done, those of requests
    before it and its own that are not cached. Decode: where the most blocks are, among the workers
    that have at most a quarter more sequences than the least loaded one.
    """
    if prefills:
        return sorted(workers, key=lambda worker: _load(worker, True) - _cached_tokens(sequence, worker))
    if not workers:
        return []
    bound = 1.25 * min(_load(worker, False) for worker in workers) + 1

    def rank(worker: InstanceHandle) -> tuple[bool, int, int]:
        load = _load(worker, False)
        return load > bound, -_cached_tokens(sequence, worker), load

    return sorted(workers, key=rank)


PLACEMENTS: dict[str, Placement] = {"fcfs": fcfs, "least_loaded": least_loaded, "prefix_aware": prefix_aware}
"""By their name in the configuration."""


def _load(worker: InstanceHandle, prefills: bool) -> int:
    return worker.num_tokens_to_prefill if prefills else len(worker.seats) + len(worker.reserved)


def _cached_tokens(sequence: Sequence, worker: InstanceHandle) -> int:
    block_size = worker.pool.block_size
    return worker.pool.count_cached_prefix(sequence.hashes(block_size)) * block_size


class Admission:
    """Gives requests their seats.

    The decode side is reserved together with the prefill side: a prompt that has been computed
    always has somewhere to go.

    Args:
        instances: all there are, by id.
        config: for the budgets of steps, and in which order workers are tried.
        policy: whose prompt goes first.
        can_send: whether KV can go from one worker to another, by their ids.

    Attributes:
        is_full: the last request found no slot or too few blocks.
    """

    def __init__(
        self,
        instances: Mapping[str, InstanceHandle],
        config: Config,
        policy: QueuePolicy,
        can_send: Callable[[str, str], bool],
    ) -> None:
        self._placement = PLACEMENTS[config.performance.placement]
        self._instances = instances
        self._can_send = can_send
        self._local_prefill_tokens = config.kv_transfer.local_prefill_tokens
        self._headroom_tokens = config.performance.decode_headroom_tokens
        # What the next step can take of all prompts, and of one.
        self._enough_tokens = self._most_of_one = prefill_budget(config)
        if config.chunked_prefill.enabled:
            self._most_of_one = config.chunked_prefill.chunk_size
        self._policy = policy
        self.is_full = False

    def seat(self, sequence: Sequence) -> bool:
        """Seat a request for prefill and decode, in the order of the placement; False if nothing fits now.

        A worker that has prompts enough to fill its next step is given no more, unless they would be
        computed before one that it has: who waits without a seat holds no blocks and can be overtaken.
        """
        workers = [
            worker
            for worker in self._instances.values()
            if worker.ready and worker.has_free_slot and not worker.is_draining
        ]
        able = [worker for worker in workers if worker.role.prefills]
        hungry = [worker for worker in able if not self._has_enough(worker, sequence)]
        self.is_full = False
        prefill_workers = self._placement(sequence, hungry, True)
        decode_workers = self._placement(sequence, [worker for worker in workers if not worker.role.prefills], False)
        if self._seat_where_it_decodes(sequence, decode_workers):
            return True
        num_tokens = len(sequence.tokens)
        for prefill_worker in prefill_workers:
            if prefill_worker.role.decodes:
                seat = self._take_seat(sequence, prefill_worker, num_tokens + 1)
                if seat is not None:
                    return _start_prefill(sequence, seat, seat)
            elif num_tokens + 1 == sequence.max_total_tokens:  # one token to go: prefill gives it
                seat = self._take_seat(sequence, prefill_worker, num_tokens)
                if seat is not None:
                    return _start_prefill(sequence, seat, None)
            else:
                for decode_worker in decode_workers:
                    if not self._can_send(prefill_worker.id, decode_worker.id):
                        continue
                    decode_seat = self._take_seat(sequence, decode_worker, num_tokens + 1)
                    if decode_seat is None:
                        continue
                    seat = self._take_seat(sequence, prefill_worker, num_tokens)
                    if seat is not None:
                        return _start_prefill(sequence, seat, decode_seat)
                    release_seat(sequence, decode_seat)
                    break
        self.is_full = bool(hungry) or not able
        return False

    def _seat_where_it_decodes(self, sequence: Sequence, decode_workers: list[InstanceHandle]) -> bool:
        """Spare a request the transfer if so little of its prompt is to be computed that it disturbs nobody."""
        num_tokens = len(sequence.tokens)
        for worker in decode_workers if self._local_prefill_tokens else ():
            block_size = worker.pool.block_size
            hashes = sequence.hashes(block_size)[: (num_tokens - 1) // block_size]
            uncached = num_tokens - worker.pool.count_cached_prefix(hashes) * block_size
            if uncached <= self._local_prefill_tokens:
                seat = self._take_seat(sequence, worker, num_tokens + 1, prefills=True)
                if seat is not None:
                    return _start_prefill(sequence, seat, seat)
        return False

    def _has_enough(self, worker: InstanceHandle, sequence: Sequence) -> bool:
        num_tokens, now = 0, time.monotonic()
        key = self._policy.key(sequence, 0, now)
        for seated, seat in worker.seats.items():
            remaining = seat.num_tokens_at_entry - seat.num_planned
            if remaining > 0:
                if self._policy.key(seated, seat.num_planned, now) > key:
                    return False
                num_tokens += min(remaining, self._most_of_one)
        return num_tokens >= self._enough_tokens

    def _take_seat(
        self, sequence: Sequence, worker: InstanceHandle, num_positions: int, prefills: bool | None = None
    ) -> Seat | None:
        """A slot and blocks for ``num_positions`` on a worker, its prefix cache used; None if it has not enough.

        Args:
            prefills: whether the prompt is computed there; default: by the worker's role.
        """
        if prefills is None:
            prefills = worker.role.prefills
        pool = worker.pool
        num_tokens = len(sequence.tokens)
        num_running = len(worker.seats) + len(worker.reserved) if worker.role.decodes else 0
        headroom_tokens = self._headroom_tokens
        pool.decode_headroom_blocks = num_running * -(-headroom_tokens // pool.block_size)
        # A worker that prefills must compute the last token, or there are no logits to sample from.
        usable = num_tokens - 1 if prefills else num_tokens
        hashes = sequence.hashes(pool.block_size)[: usable // pool.block_size]
        hits = pool.count_cached_prefix(hashes)
        owner = f"{sequence.arrival}.{sequence.attempt}"
        num_blocks = -(-num_positions // pool.block_size)
        if pool.allocate_blocks(owner, num_blocks, InstanceRole.PREFILL, hashes) is None:
            return None
        cached = hits * pool.block_size
        return Seat(
            worker=worker,
            epoch=worker.arena_epoch,
            pool=pool,
            owner=owner,
            slot=worker.take_slot(),
            num_tokens_at_entry=num_tokens,
            num_planned=cached,
            num_computed=cached,
            num_sealed=hits,
        )


def _start_prefill(sequence: Sequence, seat: Seat, decode_seat: Seat | None) -> bool:
    sequence.prefill_seat, sequence.decode_seat = seat, decode_seat
    seat.worker.activate(sequence, seat)
    if decode_seat is not None and decode_seat is not seat:
        decode_seat.worker.reserve(sequence, decode_seat)
        sequence.num_blocks_dispatched = decode_seat.num_computed // decode_seat.pool.block_size
        decode_seat.num_planned = decode_seat.num_tokens_at_entry
    return True


def release_seat(sequence: Sequence, seat: Seat) -> None:
    """Give slot and blocks back; the blocks return when nothing in flight can touch them."""
    seat.worker.release(sequence, seat)
    seat.pool.deallocate_blocks(seat.owner)
