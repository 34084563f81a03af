"""Which of several workers a request goes to: the order in which admission tries them."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as List

from hbserve.pd_disagg.instance_handle import InstanceHandle
from hbserve.pd_disagg.sequence import Sequence

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
