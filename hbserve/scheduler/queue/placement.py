"""The orders in which instances are asked for room for a request, by `performance.placement`."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from collections.abc import Sequence as Items

from hbserve.scheduler.instance import InstanceHandle
from hbserve.scheduler.sequence import Sequence

Placement = Callable[[Sequence, Items[InstanceHandle], bool], list[InstanceHandle]]
"""Orders instances, given in the order of the configuration, for a request; the flag: to prefill it there."""

_ANEW = 1.25
"""Weight of a token that an instance must compute for the new prompt alone."""


def fcfs(sequence: Sequence, instances: Items[InstanceHandle], prefills: bool) -> list[InstanceHandle]:
    """Take the first in the configuration that has room: later ones stay idle until they are needed."""
    return list(instances)


def least_loaded(sequence: Sequence, instances: Items[InstanceHandle], prefills: bool) -> list[InstanceHandle]:
    """Prefill where the fewest prompt tokens are still to be computed, decode where the fewest sequences are.

    The number of sequences also decides between instances without prompts. Otherwise, if one worker does both phases,
    all requests of a light load would go to the first instance.
    """
    return sorted(instances, key=lambda instance: (_load(instance, prefills), instance.num_sequences))


def prefix_aware(sequence: Sequence, instances: Items[InstanceHandle], prefills: bool) -> list[InstanceHandle]:
    """Prefer instances that have the prompt in their prefix cache, or compute it now, unless too much else waits there.

    Prefill: where the fewest tokens are to be computed until the prompt is done, counting requests before it and, a
    quarter more, its own tokens that are not there: to compute what another instance has costs all requests. Decode:
    where most of its blocks are, among the instances that have at most a quarter more sequences than the least loaded
    one.
    """
    if len(instances) < 2:
        return list(instances)
    if prefills:

        def cost(instance: InstanceHandle) -> tuple[float, int]:
            num_missing = len(sequence.tokens) - present_tokens(sequence, instance)
            return _tokens_to_compute(instance) + _ANEW * num_missing, instance.num_sequences

        return sorted(instances, key=cost)
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


def _tokens_to_compute(instance: InstanceHandle) -> int:
    """Return the prompt tokens that an instance has still to compute; what its prompts have in common counts once."""
    prompts, pool = instance.prompts, instance.pool
    num_tokens = _load(instance, True)
    if len(prompts) < 2 or not pool.enable_prefix_caching:
        return num_tokens
    hashes = [sequence.hashes(pool.block_size) for sequence, _ in prompts]
    for number, (_, allocation) in enumerate(prompts):
        num_blocks = max((num_equal(hashes[number], other) for other in hashes[:number]), default=0)
        num_shared = num_blocks * pool.block_size - allocation.num_planned
        num_tokens -= min(max(0, num_shared), allocation.num_to_prefill)
    return num_tokens


def present_tokens(sequence: Sequence, instance: InstanceHandle) -> int:
    """Return how many leading tokens of a request an instance has in its prefix cache, or will have.

    Those that it computes now count, because requests that begin alike share them.
    """
    pool, hashes = instance.pool, sequence.hashes(instance.pool.block_size)
    num_blocks = pool.count_cached_prefix(hashes)
    if pool.enable_prefix_caching:
        num_blocks = pool.find_joinable(hashes, num_blocks, len(hashes))
        for other, _ in instance.prompts:
            num_blocks = max(num_blocks, num_equal(hashes, other.hashes(pool.block_size)))
    return num_blocks * pool.block_size


def num_equal(hashes: list[bytes], others: list[bytes]) -> int:
    """Return how many leading blocks two prompts have in common: equal hashes say that all before is equal, too."""
    if not hashes or not others or hashes[0] != others[0]:
        return 0
    ends = range(min(len(hashes), len(others)))
    return bisect.bisect_left(ends, True, key=lambda index: hashes[index] != others[index])


def cached_tokens(sequence: Sequence, instance: InstanceHandle) -> int:
    """Return how many leading tokens of a request an instance has in its prefix cache."""
    block_size = instance.pool.block_size
    return instance.pool.count_cached_prefix(sequence.hashes(block_size)) * block_size
