"""The orders in which instances are asked for room for a request, by `performance.placement`."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import Sequence

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
            return _load(instance, True) - cached_tokens(sequence, instance), instance.num_sequences

        return sorted(instances, key=cost)
    if not instances:
        return []
    bound = 1.25 * min(_load(instance, False) for instance in instances) + 1

    def rank(instance: InstanceHandle) -> tuple[bool, int, int]:
        load = _load(instance, False)
        return load > bound, -cached_tokens(sequence, instance), load

    return sorted(instances, key=rank)


PLACEMENTS: dict[str, Placement] = {"fcfs": fcfs, "least_loaded": least_loaded, "prefix_aware": prefix_aware}
"""Placements by their name in the configuration."""


def _load(instance: InstanceHandle, prefills: bool) -> int:
    if not prefills:
        return instance.num_sequences
    return instance.num_tokens_to_prefill if instance.prompts else 0


def cached_tokens(sequence: Sequence, instance: InstanceHandle) -> int:
    """Return how many leading tokens of a request an instance has in its prefix cache."""
    block_size = instance.pool.block_size
    return instance.pool.count_cached_prefix(sequence.hashes(block_size)) * block_size
